// Lines over an axis.

/* spec: { label, x: { title, domain, kind, ticks, format }, y: { title, domain, kind, format },
           series: [{ key, name, colour, dash, wide, points: [[x, y], ...] }], marks: [{ x, text }] } */
function drawLines(spec, state, width) {
  const height = spec.height || Math.round(Math.min(320, Math.max(230, width * 0.6)));
  const { x: ax, y: ay } = spec;
  const yTicks = (ay.kind === "log" ? logTicks : linearTicks)(ay.domain);
  const left = Math.ceil(widest(yTicks.map((tick) => ay.format(tick)))) + 14;
  const [right, top, bottom] = [width - 14, 40, height - 42];
  const x = scale(ax.domain, [left, right], ax.kind);
  const y = scale(ay.domain, [bottom, top], ay.kind);
  const within = ([at, value]) =>
    isNumber(value) && at >= ax.domain[0] && at <= ax.domain[1] && !(ay.kind === "log" && value < ay.domain[0] * 0.999);

  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": spec.label });
  for (const tick of yTicks) {
    root.append(
      svg("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }),
      svg("text", { class: "tick", x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, ay.format(tick)),
    );
  }
  let taken = -Infinity;
  for (const tick of ax.ticks || (ax.kind === "log" ? logTicks : linearTicks)(ax.domain, Math.max(2, Math.floor(width / 64)))) {
    const [text, at] = [ax.format(tick), x(tick)];
    const half = widthOf(text) / 2;
    root.append(svg("line", { class: "axis", x1: at, x2: at, y1: bottom, y2: bottom + 4 }));
    if (at - half < taken + 6) continue; // it would touch the one before
    taken = at + half;
    const anchor = at + half > width - 2 ? "end" : "middle";
    root.append(svg("text", { class: "tick", x: anchor === "end" ? width - 2 : at, y: bottom + 18, "text-anchor": anchor }, text));
  }
  root.append(
    svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
    svg("text", { class: "title", x: 0, y: 12 }, fitted(ay.title, width)),
    svg("text", { class: "title", x: (left + right) / 2, y: height - 5, "text-anchor": "middle" }, fitted(ax.title, right - left)),
  );
  for (const mark of spec.marks || []) drawMark(root, mark, { x, left, right, top, bottom });

  const visible = spec.series.filter((one) => !state.hidden.has(one.key));
  for (const one of visible) {
    const dimmed = state.emphasised !== null && state.emphasised !== one.key;
    root.append(svg("path", {
      class: "line", d: pathOf(one.points, within, x, y), style: `stroke: ${one.colour}`,
      "stroke-dasharray": one.dash || null, "stroke-width": one.wide ? 2.75 : 1.75, opacity: dimmed ? 0.18 : null,
    }));
    if (one.dots) one.points.filter(within).forEach(([at, value]) =>
      root.append(svg("circle", { cx: x(at), cy: y(value), r: 2.75, style: `fill: ${one.colour}`, opacity: dimmed ? 0.18 : null })));
  }
  const stops = [...new Set(visible.flatMap((one) => one.points.filter(within).map(([at]) => at)))].sort((a, b) => a - b);
  if (!stops.length) {
    root.append(svg("text", { class: "title", x: (left + right) / 2, y: (top + bottom) / 2, "text-anchor": "middle" }, "nothing to draw"));
    return root;
  }
  const cross = svg("g", { class: "cross" });
  root.append(cross);
  let pointed = null;
  const valuesAt = (stop) => visible.flatMap((one) => {
    const found = one.points.find(([at]) => at === stops[stop]);
    return found && within(found) ? [{ one, value: found[1] }] : [];
  });
  return interactive(root, {
    at(px, py) {
      pointed = py;
      if (px < left - 12 || px > right + 12) return null;
      return stops.reduce((best, at, i) => (Math.abs(x(at) - px) < Math.abs(x(stops[best]) - px) ? i : best), 0);
    },
    step(stop, key) {
      pointed = null;
      return stepped(stop, stops.length, key);
    },
    describe(stop) {
      const found = valuesAt(stop);
      const near = pointed === null ? null : found.reduce(
        (best, entry) => (best && Math.abs(y(best.value) - pointed) <= Math.abs(y(entry.value) - pointed) ? best : entry), null);
      return {
        title: `${ax.name || ax.title}: ${(ax.exact || ax.format)(stops[stop])}`,
        rows: found.map((entry) => ({
          name: entry.one.name, value: (ay.exact || ay.format)(entry.value), colour: entry.one.colour, dash: entry.one.dash,
          strong: entry === near && found.length > 1,
        })),
        x: x(stops[stop]), y: found.length ? Math.min(...found.map((entry) => y(entry.value))) : top,
      };
    },
    mark(stop) {
      if (stop === null) return cross.replaceChildren();
      const at = x(stops[stop]);
      return cross.replaceChildren(
        svg("line", { x1: at, x2: at, y1: top, y2: bottom }),
        ...valuesAt(stop).map(({ one, value }) => svg("circle", { cx: at, cy: y(value), r: 3.5, style: `fill: ${one.colour}` })),
      );
    },
  });
}

function pathOf(points, within, x, y) {
  let [path, drawn] = ["", false];
  for (const point of points) {
    if (!within(point)) {
      drawn = drawn && !isNumber(point[0]);
      continue;
    }
    path += `${drawn ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`;
    drawn = true;
  }
  return path;
}

// A dashed line across the plot, its text above.
function drawMark(root, mark, { x, left, right, top, bottom }) {
  const at = x(mark.x);
  if (at < left - 1 || at > right + 1) return;
  const text = fitted(mark.text, right - left);
  const half = widthOf(text) / 2;
  const middle = Math.min(right - half, Math.max(left + half, at));
  root.append(
    svg("line", { class: "mark", x1: at, x2: at, y1: top - 4, y2: bottom }),
    svg("text", { class: "mark", x: middle, y: top - 10, "text-anchor": "middle" }, text),
  );
}

// Plots side by side with one legend: `make()` returns their specs as things are now.
function linePlots(least, entries, state, make) {
  const count = make(state).length;
  const boxes = Array.from({ length: count }, (_, i) => plot((width) => drawLines(make(state)[i], state, width)));
  const redraw = () => boxes.forEach((box) => box.redraw());
  const titles = make(state).map((spec) => spec.heading);
  return {
    redraw,
    nodes: [
      panels(least, ...boxes.map((box, i) => panel(titles[i], box))),
      entries.length > 1 ? legend(entries, state, redraw) : null,
    ],
  };
}
