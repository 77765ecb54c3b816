// The document, and the plots that both the averages over the model and single matrices have.

const data = JSON.parse(document.getElementById("document").textContent);
const NAMES = data.about.models.map((model) => model.name);
const CENTRES = { average: "Centred", base: "Uncentred" };
const MEANINGS = { average: "around the average", base: "around the base" };
const REACH = 0.32; // up to where the curves zoom: the ranks that merges use

// The centres that something was measured around: the base may lack a matrix.
function centresOf(around) {
  return Object.keys(CENTRES).filter((centre) => around?.[centre]?.reconstruction?.length);
}

function modelLines(names) {
  return names.map((name) => ({ key: name, name, ...lineOf(NAMES.indexOf(name)) }));
}

function rankAxis(most) {
  return { title: "rank k, as a share of the full rank", name: "rank", domain: [0, most], format: ratio };
}

function zoomed(now, most, plots) {
  if (most <= REACH) return null;
  return toggle(`only up to ${ratio(REACH)}`, now.zoom, (on) => {
    now.zoom = on;
    plots.redraw();
  });
}

// What the reader has switched on; the explorer keeps it from one matrix to the next.
function reading() {
  return { log: false, zoom: false, centre: null, shown: shown() };
}

// The spectra of every model side by side for both centres, on one scale. `get(centre)`: { at, spectra } by model.
function spectraPlots(centres, names, get, title, mark, now = reading()) {
  const lines = modelLines(names);
  const most = extent(centres.map((centre) => get(centre).at))?.[1] || 1; // not all singular values may be known
  const plots = linePlots(340, lines, now.shown, (state) => {
    const axis = rankAxis(now.zoom ? Math.min(REACH, most) : most);
    const seen = centres.flatMap((centre) => {
      const { at, spectra } = get(centre);
      return spectra.filter((_, t) => !state.hidden.has(names[t])).map((one) => one.filter((_, i) => at[i] <= axis.domain[1]));
    });
    const kind = now.log ? "log" : "linear";
    const range = extent(seen, kind);
    const domain = now.log ? [Math.max(range ? range[0] : 1e-3, (range ? range[1] : 1) * 1e-5), range ? range[1] : 1] : fromZero(range);
    if (now.log && domain[0] === domain[1]) domain[0] /= 10;
    return centres.map((centre) => {
      const { at, spectra } = get(centre);
      return {
        heading: `${CENTRES[centre]} (${MEANINGS[centre]})`, label: `Singular values of each model, ${MEANINGS[centre]}`,
        x: axis, y: { title, domain, kind, format: short, exact: short },
        series: lines.map((line, t) => ({ ...line, points: at.map((place, i) => [place, spectra[t][i]]) })),
        marks: mark === null ? [] : [{ x: mark, text: `this merge: ${ratio(mark)}` }],
      };
    });
  });
  return [
    controls(
      toggle("logarithmic", now.log, (on) => {
        now.log = on;
        plots.redraw();
      }),
      zoomed(now, most, plots),
    ),
    ...plots.nodes,
  ];
}

// R(k) and I(k) side by side, a line for each centre. `get(centre)`: { reconstruction, interference }, R relative to R(0).
function curvePlots(centres, get, mark, now = reading()) {
  const lines = centres.map((centre) => ({
    key: centre, name: `${CENTRES[centre].toLowerCase()} (${MEANINGS[centre]})`,
    ...(centre === "average" ? { colour: CART, dash: "", wide: true } : { colour: "var(--line-0)", dash: "7 3" }),
  }));
  const what = [
    ["reconstruction", "What truncation loses: R(k)", "R(k) / R(0)", ratio],
    ["interference", "How models collide: I(k)", "I(k), summed over the pairs of models", short],
  ];
  const most = Math.max(...data.about.ratios);
  const plots = linePlots(340, lines, now.shown, () => what.map(([key, heading, title, format]) => {
    const axis = rankAxis(now.zoom ? Math.min(REACH, most) : most);
    const points = (centre) => data.about.ratios.map((at, i) => [at, get(centre)[key]?.[i]]);
    const seen = centres.map((centre) => points(centre).filter(([at]) => at <= axis.domain[1]).map(([, value]) => value));
    return {
      heading, label: `${title} over the rank, for each centre`, x: axis,
      y: { title, domain: fromZero(extent(seen)), format, exact: key === "reconstruction" ? percent : short },
      series: lines.map((line) => ({ ...line, dots: now.zoom, points: points(line.key) })),
      marks: mark === null ? [] : [{ x: mark, text: `this merge: ${ratio(mark)}` }],
    };
  }));
  const zoom = zoomed(now, most, plots);
  return [zoom ? controls(zoom) : null, ...plots.nodes];
}

// Model by model: cosine, overlap and interference, for the centre that the reader chooses.
function similarityPlots(centres, names, get, now = reading()) {
  if (!centres.includes(now.centre)) [now.centre] = centres;
  const apart = (matrix) => names.map((_, i) => names.map((_, j) => (i === j ? null : matrix?.[i]?.[j])));
  const columns = names.map((name) => ({ text: name, name }));
  const kinds = [
    ["cosine", "Cosine", "Do updates point the same way?", "cosine", true],
    ["overlap", "Subspace overlap", "Do they share directions?", "overlap", false],
    ["pairs", "Interference", "Do these directions collide?", "interference", false],
  ];
  const maps = kinds.map(([key, , , measure, signed]) => heatMap(() => {
    const values = apart(get(now.centre)[key]);
    const range = extent(values) || [0, 1];
    const most = Math.max(signed ? 0.2 : 0, Math.abs(range[0]), Math.abs(range[1])) || 1;
    const low = Math.max(0, range[1] - 2 * Math.max(range[1] - range[0], range[1] / 4)); // pairs differ by little
    const opposed = signed && range[0] < 0;
    return {
      label: `${measure} of every two models, ${MEANINGS[now.centre]}`, rows: names, columns, values,
      domain: opposed ? [-most, most] : [signed ? 0 : low, most], signed: opposed, format: tight, ends: fixed, exact: short, measure,
      written: names.length <= 10, name: (i, j) => (i === j ? `${names[i]}, itself` : `${names[i]} and ${names[j]}`),
    };
  }));
  const least = names.length > 5 ? 360 : 280; // the values are to fit into the cells
  return [
    centres.length > 1
      ? controls(choice("Task vectors", centres.map((centre) => [centre, CENTRES[centre]]), now.centre, (centre) => {
        now.centre = centre;
        maps.forEach((map) => map.redraw());
      }))
      : null,
    panels(least, ...maps.map((map, i) => panel(kinds[i][1], html("p", { class: "aside" }, kinds[i][2]), map))),
  ];
}
