// Horizontal bars from zero, the value at the end of each.

/* spec: { label, rows: [{ name, value, colour }], format, exact, marks: [{ x, text }], measure } */
function drawBars(spec, width) {
  const high = 26;
  const top = spec.marks ? 26 : 6;
  const values = spec.rows.map((row) => row.value);
  const room = Math.ceil(widest(values.map((value) => spec.format(value)))); // for the longest number
  const names = spec.rows.map((row) => widthOf(row.name) * (row.strong ? 1.15 : 1)); // bold is wider
  const left = Math.ceil(Math.min(Math.max(...names), width * 0.36, 190)) + 10;
  const right = width - room - 12;
  const [low, most] = extent([values, [0], (spec.marks || []).map((mark) => mark.x)]);
  const negative = low < 0 ? room + 6 : 0;
  const x = scale([low, most > low ? most : 1], [left + negative, right]);
  const bottom = top + spec.rows.length * high;
  const root = svg("svg", { viewBox: `0 0 ${width} ${bottom + 6}`, role: "img", "aria-label": spec.label });
  root.append(svg("line", { class: "axis", x1: x(0), x2: x(0), y1: top, y2: bottom }));
  const lit = svg("rect", { class: "lit", x: 0, width, height: high, visibility: "hidden" });
  root.append(lit);
  spec.rows.forEach((row, i) => {
    const middle = top + (i + 0.5) * high;
    root.append(svg("text", { class: row.strong ? "tick strong" : "tick", x: left - 8, y: middle + 4, "text-anchor": "end" }, fitted(row.name, left - 8)));
    if (isNumber(row.value)) {
      const [from, to] = [Math.min(x(0), x(row.value)), Math.max(x(0), x(row.value))];
      root.append(svg("rect", { x: from, y: middle - 7, width: Math.max(1, to - from), height: 14, rx: 2, style: `fill: ${row.colour}` }));
    }
    const end = isNumber(row.value) ? x(row.value) : x(0);
    root.append(svg("text", { class: "number", x: row.value < 0 ? end - 5 : end + 6, y: middle + 4, "text-anchor": row.value < 0 ? "end" : null }, spec.format(row.value)));
  });
  for (const mark of spec.marks || []) drawMark(root, mark, { x, left: left + negative, right, top: top - 2, bottom });
  return interactive(root, {
    at: (px, py) => (py >= top && py < bottom ? Math.floor((py - top) / high) : null),
    step: (stop, key) => stepped(stop, spec.rows.length, key),
    describe: (stop) => ({
      title: spec.rows[stop].name,
      rows: [{ name: spec.measure, value: (spec.exact || spec.format)(spec.rows[stop].value) }],
      x: right, y: top + (stop + 0.5) * high,
    }),
    mark(stop) {
      lit.setAttribute("visibility", stop === null ? "hidden" : "visible");
      if (stop !== null) lit.setAttribute("y", top + stop * high);
    },
  });
}

function bars(spec) {
  return plot((width) => drawBars(spec, width));
}
