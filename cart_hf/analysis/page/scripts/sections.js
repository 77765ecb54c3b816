// What each section of the page shows; by the name that its place in the page has.

const sections = {
  radar(place) {
    const { rows, tasks, source } = data.results;
    const alone = rows.find((row) => row.name === "individual");
    const share = (row, task) => (isNumber(row.scores[task]) && alone.scores[task] ? row.scores[task] / alone.scores[task] : null);
    let [ours, others] = [0, 0];
    const series = rows.filter((row) => row !== alone).map((row) => {
      const emphasised = source === "evaluation" || row.name.toLowerCase().startsWith("cart"); // the merged model is all there is
      const plain = row.name === "pretrained" ? { colour: "var(--faint)", dash: "2 3" } : null;
      const line = emphasised ? { colour: CART, dash: DASHES[ours++ % DASHES.length], wide: ours === 1 } : plain || lineOf(others++);
      return { key: row.name, name: row.name, ...line, values: tasks.map((task) => share(row, task)), scores: tasks.map((task) => row.scores[task]) };
    });
    const state = shown();
    const label = "Scores of each merged model relative to the task's own model";
    const box = plot((width) => drawRadar({ label, tasks, series }, state, Math.min(width, 640)));
    box.classList.add("radar");
    place.append(box, legend(series, state, box.redraw));
  },

  tuning(place) {
    const { points, parameters, best, method } = data.tuning;
    const written = (value) => (isNumber(value) ? String(Number(value.toPrecision(4))) : String(value));
    const distinct = (name, among = points) => [...new Set(among.map((point) => point.parameters[name]))].sort((a, b) => a - b);
    const varied = parameters.filter((name) => points.every((point) => isNumber(point.parameters[name])) && distinct(name).length > 1);
    const [first, second] = varied;
    if (!first) return place.append(nothing("All points have the same settings: there is no curve to draw."));
    const others = parameters.filter((name) => name !== first && name !== second);
    const slice = points.filter((point) => others.every((name) => point.parameters[name] === best?.[name]));
    const [across, down] = [distinct(first, slice), second ? distinct(second, slice).reverse() : [null]];
    const now = { score: "" };
    const scoreOf = (point) => (now.score ? point?.scores?.[now.score] : point?.average);
    const pointAt = (a, b) => slice.find((point) => point.parameters[first] === a && (!second || point.parameters[second] === b));
    const isBest = (a, b) => best && best[first] === a && (!second || best[second] === b);
    const noted = others.map((name) => `${name} ${written(best?.[name])}`).join(", ");
    const hundredth = (value) => (isNumber(value) ? fixed(100 * value, 1) : "");

    const map = second && heatMap(() => {
      const values = down.map((b) => across.map((a) => scoreOf(pointAt(a, b))));
      const [i, j] = [down.findIndex((b) => isBest(best?.[first], b)), across.indexOf(best?.[first])];
      return {
        label: `Score for each ${first} and ${second}`, rows: down.map(written), columns: across.map((a) => ({ text: written(a) })),
        values, domain: extent(values) || [0, 1], format: hundredth, ends: hundredth, measure: now.score || "average score", written: true, most: 64,
        mark: i >= 0 && j >= 0 ? [i, j] : null, corner: `${first} →, ${second} ↓`,
        name: (r, c) => `${first} ${written(across[c])}, ${second} ${written(down[r])}${isBest(across[c], down[r]) ? " (chosen)" : ""}`,
      };
    });

    let other = 0;
    const lines = [...down].reverse().map((b) => ({
      key: String(b), name: second ? `${second} ${written(b)}` : "score", b,
      ...((second ? best?.[second] === b : true) ? { colour: CART, dash: "", wide: true } : lineOf(other++)),
    }));
    const plain = method === "cart" ? slice.find((point) => point.parameters.rank_ratio === 1 || point.parameters.scale === 0) : null;
    const wide = across[across.length - 1] > 8 * (across.find((value) => value > 0) || Infinity);
    const kind = !wide || across[0] < 0 ? "linear" : across[0] > 0 ? "log" : "sqrt";
    const average = { key: "average", name: "weight average", colour: "var(--faint)", dash: "2 3" };
    const curves = linePlots(300, plain ? [average, ...lines] : lines, shown(), () => {
      const seen = slice.map(scoreOf);
      const range = extent([seen]) || [0, 1];
      const pad = Math.max(0.005, (range[1] - range[0]) * 0.12);
      const level = plain ? [{ ...average, points: across.map((a) => [a, scoreOf(plain)]) }] : [];
      return [{
        heading: second ? `Over ${first}, for each ${second}` : `Over ${first}`, label: `Score over ${first}`, height: 320,
        x: { title: first, domain: across.length > 1 ? [across[0], across[across.length - 1]] : [0, 1], kind, ticks: across, format: written },
        y: { title: `${now.score || "average score"}, in percent`, domain: [range[0] - pad, range[1] + pad], format: (v) => String(Number((100 * v).toFixed(1))), exact: hundredth },
        series: [...level, ...lines.map((line) => ({ ...line, dots: true, points: across.map((a) => [a, scoreOf(pointAt(a, line.b))]) }))],
        marks: best ? [{ x: best[first], text: `chosen: ${written(best[first])}` }] : [],
      }];
    });
    const tasks = Object.keys(points[0].scores || {});
    const which = chooser("Score", [["", "average"], ...tasks.map((task) => [task, task])], (value) => {
      now.score = value;
      if (map) map.redraw();
      curves.redraw();
    });
    place.append(
      controls(which.node),
      panels(340, map ? panel(noted ? "Points with the other settings as chosen" : "Every point that was tried", map) : "", html("div", {}, ...curves.nodes.filter(Boolean))),
      noted ? html("p", { class: "aside" }, `Shown at ${noted}, as chosen.`) : "",
    );
    return null;
  },

  spectra(place) {
    const centres = centresOf(data.mean);
    place.append(...spectraPlots(centres, NAMES, (centre) => ({ at: data.mean[centre].spectra_at, spectra: data.mean[centre].spectra }),
      "singular value / norm of the update", data.rank_ratio).filter(Boolean));
  },

  curves(place) {
    place.append(...curvePlots(centresOf(data.mean), (centre) => data.mean[centre], data.rank_ratio).filter(Boolean));
  },

  similarity(place) {
    const get = (centre) => ({ ...data.mean[centre], cosine: data.whole.cosine?.[centre] || data.mean[centre].cosine });
    place.append(...similarityPlots(centresOf(data.mean), NAMES, get).filter(Boolean));
  },

  layers(place) {
    const { share, growth, merged_growth: merged, retention } = data.layers;
    const centres = Object.keys(CENTRES).filter((centre) => share[centre]);
    const measures = {
      ...Object.fromEntries(centres.map((centre) => [`share-${centre}`, {
        text: centres.length > 1 ? `Share, ${CENTRES[centre].toLowerCase()}` : "Share", values: share[centre], rows: NAMES, measure: "share of the update",
        says: `Which part of each model's whole update (${MEANINGS[centre]}, squared) lies in which block: each row sums to 100\u202f%.`,
      }])),
      ...(growth ? { growth: {
        text: "Growth", values: merged ? [...growth, merged] : growth, rows: merged ? [...NAMES, "merged"] : NAMES, measure: "distance from the base / norm of the base",
        says: "How far each block has moved from the base, relative to the base's norm; the last row is the merged model.",
      } } : {}),
      ...(retention ? { retention: {
        text: "Retention", values: retention, rows: NAMES, measure: "retention", least: 1,
        says: "How much of each model's update the merged model has in each block: 100\u202f% is all of it, 0\u202f% none, below 0\u202f% it moved the other way.",
      } } : {}),
    };
    const now = { key: Object.keys(measures)[0] };
    const columns = data.blocks.map((block) => ({
      text: block.block === null ? block.label.split(".").pop() : String(block.block), group: block.block === null ? null : block.path,
    }));
    const says = html("p", { class: "aside" });
    const map = heatMap(() => {
      const { values, rows, measure, least } = measures[now.key];
      const range = extent(values) || [0, 1];
      return {
        label: `${measure}, models by blocks`, rows, columns, values, measure, most: 110, ends: (value) => percent(value, 0), format: (value) => (isNumber(value) ? fixed(100 * value, 0) : ""),
        domain: [Math.min(0, range[0]), Math.max(range[1], least || 0) || 1], signed: range[0] < 0, exact: percent, written: true,
        name: (i, j) => `${rows[i]}, ${data.blocks[j].label}`,
      };
    });
    const show = (key) => {
      now.key = key;
      says.textContent = measures[key].says;
      map.redraw();
    };
    const options = Object.entries(measures).map(([key, { text }]) => [key, text]);
    place.append(options.length > 1 ? controls(choice("Measure", options, now.key, show)) : "", panel(null, map), says);
    show(now.key);
  },

  movement(place) {
    const { growth, merged_growth: merged, retention, centred, merged_cosine: cosine } = data.whole;
    const models = (values, colour) => NAMES.map((name, i) => ({ name, value: values[i], colour }));
    const drawn = [];
    if (growth) {
      const rows = [...models(growth, "var(--bar)"), ...(isNumber(merged) ? [{ name: "merged", value: merged, colour: CART, strong: true }] : [])];
      drawn.push(panel("Distance from the base, relative to its norm", bars({ label: "Growth of each model and of the merged one", rows, format: ratio, measure: "growth" })));
    } else {
      drawn.push(panel("Distance from the average", bars({ label: "Norm of each centred task vector", rows: models(centred, "var(--bar)"), format: short, measure: "‖W − average‖" })));
    }
    if (retention) {
      drawn.push(panel("Retention: how much of each update is in the merge", bars({
        label: "Retention of each model", rows: models(retention, CART), format: (value) => percent(value, 0), exact: percent, measure: "retention", marks: [{ x: 1, text: "all of it" }],
      })));
    }
    if (cosine) {
      drawn.push(panel("Direction: cosine of each update and the merge's", bars({
        label: "Cosine of each update and of the merge", rows: models(cosine, CART), format: fixed, exact: short, measure: "cosine",
      })));
    }
    place.append(panels(300, ...drawn));
  },
};
