// One matrix at a time: chosen by block and part, or one after the other.

sections.explorer = (place) => {
  const { matrices } = data;
  const blockOf = ({ path, block }) => [path, block].filter((part) => part !== null && part !== "").join(".") || "(outside of blocks)";
  const blocks = [...new Set(matrices.map(blockOf))];
  const among = (label) => matrices.map((matrix, i) => [i, matrix]).filter(([, matrix]) => blockOf(matrix) === label);
  const block = chooser("Block", blocks.map((label) => [label, label]), (label) => {
    const part = matrices[Number(matrix.select.value)].part;
    const there = among(label);
    show((there.find(([, one]) => one.part === part) || there[0])[0]);
  });
  const matrix = chooser("Matrix", [], (value) => show(Number(value)));
  const step = (by, text) => html("button", { type: "button", onclick: () => show(Number(matrix.select.value) + by) }, text);
  const [previous, next] = [step(-1, "← previous"), step(1, "next →")];
  const now = [reading(), reading(), reading()];
  const shownHere = html("div", { class: "explored" });

  function show(place) {
    const found = matrices[place];
    const label = blockOf(found);
    block.select.value = label;
    matrix.select.replaceChildren(...among(label).map(([i, one]) => html("option", { value: i }, one.part || one.name)));
    matrix.select.value = String(place);
    previous.disabled = place === 0;
    next.disabled = place === matrices.length - 1;
    shownHere.replaceChildren(...explored(found, place, now).filter(Boolean));
  }

  place.append(controls(block.node, matrix.node, html("div", { class: "steps" }, previous, next)), shownHere);
  show(0);
};

function explored(matrix, place, now) {
  const centres = centresOf(matrix.around);
  const full = Math.min(...matrix.shape);
  const missing = NAMES.filter((name) => !matrix.models.includes(name));
  const mark = matrix.rank / full;
  const relative = (centre) => {
    const { reconstruction, interference } = matrix.around[centre];
    return { interference, reconstruction: reconstruction.map((value) => (isNumber(value) && reconstruction[0] ? value / reconstruction[0] : null)) };
  };
  const spectra = (centre) => ({
    at: (matrix.around[centre].spectra_at || []).map((rank) => rank / full), spectra: matrix.around[centre].spectra,
  });
  return [
    html("h3", { class: "name" }, matrix.name),
    html(
      "p", { class: "aside" },
      `${place + 1} of ${data.matrices.length} · ${matrix.shape.join(" × ")} · rank ${matrix.rank} of ${full} (${ratio(mark)})`,
      missing.length ? ` · not in ${missing.join(", ")}` : null,
    ),
    numbersOf(matrix, centres),
    html("h4", {}, "Spectra"),
    ...spectraPlots(centres, matrix.models, spectra, "singular value", mark, now[0]),
    html("h4", {}, "Reconstruction and interference"),
    ...curvePlots(centres, relative, mark, now[1]),
    html("h4", {}, "Model by model"),
    ...similarityPlots(centres, matrix.models, (centre) => matrix.around[centre], now[2]),
  ];
}

function numbersOf(matrix, centres) {
  const columns = [
    ["norm", (around, t) => short(isNumber(around.squares[t]) ? Math.sqrt(around.squares[t]) : null)],
    ["kept", (around, t) => percent(around.energy[t])],
    ["effective rank", (around, t) => short(around.effective_rank[t])],
    ["stable rank", (around, t) => short(around.stable_rank[t])],
  ];
  const head = html(
    "thead", {},
    html("tr", {}, html("td", {}), centres.map((centre) => html("th", { colspan: columns.length, scope: "colgroup" }, `${CENTRES[centre]} (${MEANINGS[centre]})`))),
    html("tr", {}, html("th", { scope: "col", class: "words" }, "model"), centres.flatMap(() => columns.map(([title]) => html("th", { scope: "col" }, title)))),
  );
  const rows = matrix.models.map((name, t) => html(
    "tr", {}, html("th", { scope: "row" }, html("span", {}, name)),
    centres.flatMap((centre) => columns.map(([, value]) => html("td", {}, value(matrix.around[centre], t)))),
  ));
  return html("div", { class: "scrolls", tabindex: 0, role: "region", "aria-label": "Numbers of this matrix" }, html("table", { class: "numbers" }, head, html("tbody", {}, rows)));
}
