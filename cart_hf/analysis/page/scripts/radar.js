// Scores relative to each task's own model: an axis for each task, a closed line for each row.

/* spec: { label, tasks: [name], series: [{ key, name, colour, dash, wide, values: [task], scores: [task] }] } */
function drawRadar(spec, state, width) {
  const count = spec.tasks.length;
  const turned = count > 10; // many names are written along their axes
  const names = spec.tasks.map((task) => fitted(task, Math.min(104, width * 0.2)));
  const room = widest(names) + 14;
  const around = turned ? room : 26; // above and below
  const radius = Math.max(20, Math.min(width / 2 - room, 230));
  const height = 2 * (radius + around);
  const [cx, cy] = [width / 2, height / 2];
  const visible = spec.series.filter((one) => !state.hidden.has(one.key));
  const drawn = [...visible].sort((a, b) => Number(Boolean(a.wide)) - Number(Boolean(b.wide))); // the widest on top
  const range = extent(spec.series.map((one) => one.values)) || [0, 1];
  const rings = ringsFrom(range[0]);
  const reach = scale([rings[0], Math.max(1, range[1])], [0, radius]);
  const angle = (i) => (2 * Math.PI * i) / count - Math.PI / 2;
  const at = (i, value) => {
    const away = reach(Math.max(rings[0], value));
    return [cx + away * Math.cos(angle(i)), cy + away * Math.sin(angle(i))];
  };
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": spec.label });
  for (const ring of rings.slice(1)) {
    root.append(svg("circle", { class: ring === 1 ? "whole" : "grid", cx, cy, r: reach(ring), fill: "none" }));
  }
  const spokes = spec.tasks.map((_, i) => {
    const [x, y] = at(i, Math.max(1, range[1]));
    return svg("line", { class: "grid", x1: cx, y1: cy, x2: x, y2: y });
  });
  root.append(...spokes);
  names.forEach((name, i) => root.append(axisName(name, angle(i), cx, cy, reach(Math.max(1, range[1])) + 8, turned)));
  for (const one of drawn) {
    const whole = one.values.every(isNumber);
    const dimmed = state.emphasised !== null && state.emphasised !== one.key;
    let [path, pen] = ["", false];
    for (let i = 0; i <= count; i += 1) {
      const value = one.values[i % count];
      if (isNumber(value)) path += `${pen ? "L" : "M"}${at(i, value).map((place) => place.toFixed(1)).join(" ")}`;
      pen = isNumber(value);
    }
    root.append(svg("path", {
      class: "line", d: whole ? `${path}Z` : path, opacity: dimmed ? 0.18 : null, "stroke-width": one.wide ? 2.75 : 1.75,
      "stroke-dasharray": one.dash || null,
      style: `stroke: ${one.colour}; fill: ${one.wide && whole ? `color-mix(in srgb, ${one.colour} 9%, transparent)` : "none"}`,
    }));
  }
  for (const ring of rings.slice(1)) {
    const [x, y] = [cx + reach(ring) * Math.cos(angle(0.5)), cy + reach(ring) * Math.sin(angle(0.5))];
    root.append(svg("text", { class: "tick halo", x, y: y + 4, "text-anchor": "middle" }, percent(ring, 0)));
  }
  const dots = svg("g", { class: "cross" });
  root.append(dots);
  return interactive(root, {
    at(px, py) {
      if (Math.hypot(px - cx, py - cy) > radius + room) return null;
      const turn = (Math.atan2(py - cy, px - cx) + Math.PI / 2 + 2 * Math.PI) / (2 * Math.PI);
      return Math.round(turn * count) % count;
    },
    step: (stop, key) => stepped(stop, count, key),
    describe: (stop) => ({
      title: spec.tasks[stop],
      rows: visible.map((one) => ({
        name: one.name, value: `${percent(one.values[stop])} (${fixed(100 * one.scores[stop], 1)})`, colour: one.colour, dash: one.dash,
      })),
      note: "relative to the task's own model (and the score)",
      x: at(stop, 1)[0], y: at(stop, 1)[1],
    }),
    mark(stop) {
      spokes.forEach((spoke, i) => spoke.setAttribute("class", i === stop ? "grid lit" : "grid"));
      dots.replaceChildren(...(stop === null ? [] : visible.filter((one) => isNumber(one.values[stop])).map((one) => {
        const [x, y] = at(stop, one.values[stop]);
        return svg("circle", { cx: x, cy: y, r: 3.5, style: `fill: ${one.colour}` });
      })));
    },
  });
}

// Circles at multiples of 5, 10 or 20 % from below the lowest score up to 100 %; the centre is not below zero.
function ringsFrom(least) {
  const step = [5, 10, 20].find((size) => (100 * (1 - least)) / size + 0.5 <= 5) || 20;
  const count = Math.min(5, Math.max(1, Math.ceil((100 * (1 - least)) / step + 0.5)));
  return Array.from({ length: count + 1 }, (_, i) => Math.max(0, 100 - (count - i) * step) / 100);
}

function axisName(name, angle, cx, cy, away, turned) {
  const [right, down] = [Math.cos(angle), Math.sin(angle)];
  const [x, y] = [cx + away * right, cy + away * down];
  if (turned) {
    const back = right < -1e-6;
    const degrees = (angle * 180) / Math.PI + (back ? 180 : 0);
    return svg("text", { class: "tick", transform: `translate(${x} ${y}) rotate(${degrees})`, dy: 4, "text-anchor": back ? "end" : "start" }, name);
  }
  const anchor = Math.abs(right) < 0.15 ? "middle" : right > 0 ? "start" : "end";
  return svg("text", { class: "tick", x, y: y + 4 + 6 * down, "text-anchor": anchor }, name);
}
