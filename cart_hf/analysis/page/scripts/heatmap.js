// Numbers as colours: tasks by tasks, tasks by blocks, settings by settings.

/* spec: { label, rows: [name], columns: [{ text, name, group }], values: [row][column], domain: [low, high], format, exact,
           ends (format of the colour bar's),
           signed, mark: [row, column], written (values in the cells), most (pixels of a cell), name(row, column), corner } */
function drawHeatMap(spec, width) {
  const { rows, columns, values } = spec;
  const left = Math.ceil(Math.min(widest(rows), Math.max(64, width * 0.3), 190)) + 10;
  const wanted = (width - left - 2) / Math.max(1, columns.length);
  const cell = Math.max(13, Math.min(spec.most || 46, wanted)); // below 13 pixels, the box scrolls
  const high = Math.min(Math.max(cell, 18), 34);
  const texts = columns.map((column) => fitted(column.text, 104));
  const fits = texts.map((text) => widthOf(text) <= cell - 4);
  const lying = fits.map((fit, j) => fit && (columns[j].group || fits.every(Boolean))); // the others are turned
  const top = Math.max(22, ...texts.map((text, j) => (lying[j] ? 0 : Math.ceil(widthOf(text)) + 12))) + (spec.corner ? 20 : 0);
  const groups = groupsOf(columns);
  const total = Math.max(left + columns.length * cell + 2, width);
  const height = top + rows.length * high + (groups.length ? 26 : 4);
  const root = svg("svg", { viewBox: `0 0 ${total} ${height}`, width: total, height, role: "img", "aria-label": spec.label });
  if (spec.corner) root.append(svg("text", { class: "title", x: left, y: 12 }, fitted(spec.corner, total - left)));

  const few = columns.length > 1 ? Math.max(1, Math.ceil(15 / cell)) : 1; // names that would touch are left out
  columns.forEach((column, j) => {
    const x = left + (j + 0.5) * cell;
    if (j % few) return;
    root.append(lying[j]
      ? svg("text", { class: "tick", x, y: top - 8, "text-anchor": "middle" }, texts[j])
      : svg("text", { class: "tick", transform: `translate(${x + 4} ${top - 6}) rotate(-90)` }, texts[j]));
  });
  for (const { text, from, to } of groups) {
    const [x1, x2, y] = [left + from * cell + 2, left + (to + 1) * cell - 2, top + rows.length * high + 6];
    root.append(
      svg("path", { class: "axis", d: `M${x1} ${y}v4H${x2}v-4`, fill: "none" }),
      svg("text", { class: "tick", x: (x1 + x2) / 2, y: y + 17, "text-anchor": "middle" }, fitted(text, x2 - x1 + 8)),
    );
  }
  const written = values.flat().map((value) => spec.format(value));
  const size = spec.written && [11, 10, 9].find((pixels) => widest(written, pixels) <= cell - 2); // all values, or none
  rows.forEach((row, i) => {
    const y = top + i * high;
    root.append(svg("text", { class: "tick", x: left - 8, y: y + high / 2 + 4, "text-anchor": "end" }, fitted(row, left - 8)));
    columns.forEach((column, j) => {
      const value = values[i]?.[j];
      const x = left + j * cell;
      const shade = shadeOf(value, spec);
      root.append(svg("rect", { class: shade ? "cell" : "cell empty", x: x + 0.5, y: y + 0.5, width: cell - 1, height: high - 1, rx: 2, style: shade?.fill }));
      const text = size ? spec.format(value) : "";
      if (text) {
        root.append(svg("text", {
          class: `value ${shade?.strong ? "on-strong" : ""}`, style: `font-size: ${size}px`, x: x + cell / 2, y: y + high / 2 + 4, "text-anchor": "middle",
        }, text));
      }
    });
  });
  if (spec.mark) {
    const [i, j] = spec.mark;
    root.append(svg("rect", { class: "best", x: left + j * cell, y: top + i * high, width: cell, height: high, rx: 3 }));
  }
  const ring = svg("rect", { class: "ring", width: cell, height: high, rx: 3, visibility: "hidden" });
  root.append(ring);
  return interactive(root, {
    at(px, py) {
      const [i, j] = [Math.floor((py - top) / high), Math.floor((px - left) / cell)];
      return i >= 0 && i < rows.length && j >= 0 && j < columns.length ? [i, j] : null;
    },
    step(stop, key) {
      if (!rows.length || !columns.length) return null;
      const [i, j] = stop || [0, 0];
      if (key === "ArrowUp" || key === "ArrowDown") return [stepped(i, rows.length, key), j];
      return [i, stop ? stepped(j, columns.length, key) : 0];
    },
    describe([i, j]) {
      return {
        title: spec.name(i, j),
        rows: [{ name: spec.measure, value: (spec.exact || spec.format)(values[i]?.[j]) }],
        x: left + (j + 0.5) * cell, y: top + (i + 0.5) * high,
      };
    },
    mark(stop) {
      ring.setAttribute("visibility", stop ? "visible" : "hidden");
      if (!stop) return;
      ring.setAttribute("x", left + stop[1] * cell);
      ring.setAttribute("y", top + stop[0] * high);
    },
  });
}

// How a value is filled: from the ground's colour over a middle blue to a far one, below zero over vermilion.
function shadeOf(value, { domain, signed }) {
  if (!isNumber(value)) return null;
  const [low, high] = domain;
  const part = signed
    ? value / (Math.max(Math.abs(low), Math.abs(high)) || 1)
    : (value - low) / (high - low || 1);
  const amount = Math.min(1, Math.abs(part));
  const hue = part < 0 ? "cold" : "heat";
  const [from, to] = amount < 0.5 ? ["heat-zero", `${hue}-middle`] : [`${hue}-middle`, `${hue}-far`];
  const far = (200 * (amount < 0.5 ? amount : amount - 0.5)).toFixed(1);
  return { fill: `fill: color-mix(in oklab, var(--${to}) ${far}%, var(--${from}))`, strong: amount > 0.64 };
}

function groupsOf(columns) {
  const groups = [];
  columns.forEach(({ group }, j) => {
    const last = groups[groups.length - 1];
    if (!group) return;
    if (last && last.text === group && last.to === j - 1) last.to = j;
    else groups.push({ text: group, from: j, to: j });
  });
  return groups;
}

function colourBar({ domain, ends, signed }) {
  const [low, high] = domain;
  const most = Math.max(Math.abs(low), Math.abs(high));
  return html(
    "div",
    { class: "colour-bar", "aria-hidden": "true" },
    html("span", {}, ends(signed ? -most : low)),
    html("i", { class: signed ? "signed" : null }),
    html("span", {}, ends(signed ? most : high)),
  );
}

// A heat map with its colour bar, in a box that scrolls where the cells would be too small.
function heatMap(make) {
  const bar = html("div", { class: "below" });
  const box = plot((width) => {
    const spec = make();
    const drawn = drawHeatMap(spec, width);
    const more = drawn.viewBox.baseVal.width > width ? "scroll sideways for more" : "";
    bar.replaceChildren(html("span", {}, more), colourBar(spec));
    return drawn;
  });
  box.classList.add("scrolls");
  const node = html("div", {}, box, bar);
  node.redraw = box.redraw;
  return node;
}
