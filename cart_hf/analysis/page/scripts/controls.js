// Legends, switches and selects. Each calls `changed` when the reader has chosen.

const PALETTE = 7;
const DASHES = ["", "7 3", "8 3 2 3", "2 3", "9 3 2 3 2 3"];
const CART = "var(--cart)";

function lineOf(place) {
  return {
    colour: `var(--line-${place % PALETTE})`,
    dash: DASHES[Math.floor(place / PALETTE) % DASHES.length],
  };
}

function swatchOf(colour, dash, width = 2.5) {
  const line = svg("line", {
    x1: 1, x2: 23, y1: 5, y2: 5, style: `stroke: ${colour}`, "stroke-width": width, "stroke-dasharray": dash || null,
  });
  return svg("svg", { class: "swatch", viewBox: "0 0 24 10", width: 24, height: 10, "aria-hidden": "true" }, line);
}

// Which lines the reader has switched off, and which one the pointer is on; plots of one legend share it.
function shown() {
  return { hidden: new Set(), emphasised: null };
}

function legend(entries, state, changed) {
  const buttons = entries.map((entry) => {
    const emphasise = (on) => (event) => {
      if (event.pointerType !== "mouse") return; // a finger would leave it on
      state.emphasised = on && !state.hidden.has(entry.key) ? entry.key : null;
      changed();
    };
    return html(
      "button",
      {
        type: "button", "aria-pressed": String(!state.hidden.has(entry.key)), title: entry.name,
        onclick: () => {
          if (!state.hidden.delete(entry.key)) state.hidden.add(entry.key);
          state.emphasised = null;
          update();
        },
        onpointerenter: emphasise(true), onpointerleave: emphasise(false),
      },
      swatchOf(entry.colour, entry.dash),
      html("span", {}, entry.name),
    );
  });
  const all = html("button", {
    type: "button", class: "all",
    onclick: () => {
      if (state.hidden.size) state.hidden.clear();
      else entries.forEach((entry) => state.hidden.add(entry.key));
      update();
    },
  });
  function update() {
    entries.forEach((entry, i) => buttons[i].setAttribute("aria-pressed", String(!state.hidden.has(entry.key))));
    all.textContent = state.hidden.size ? "show all" : "hide all";
    changed();
  }
  all.textContent = state.hidden.size ? "show all" : "hide all";
  return html("div", { class: "legend", role: "group", "aria-label": "Lines shown" }, buttons, entries.length > 5 ? all : null);
}

// A row of buttons, one of which is on.
function choice(label, options, value, changed) {
  const buttons = options.map(([key, text]) =>
    html("button", {
      type: "button", "aria-pressed": String(key === value),
      onclick: () => {
        buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(options[i][0] === key)));
        changed(key);
      },
    }, text));
  return html("div", { class: "choice", role: "group", "aria-label": label }, buttons);
}

function toggle(text, value, changed) {
  const box = html("input", { type: "checkbox", onchange: () => changed(box.checked) });
  box.checked = value;
  return html("label", { class: "toggle" }, box, html("span", {}, text));
}

function chooser(label, options, changed) {
  const select = html(
    "select",
    { onchange: () => changed(select.value) },
    options.map(([key, text]) => html("option", { value: key }, text)),
  );
  const node = html("label", { class: "chooser" }, html("span", {}, label), select);
  return { node, select };
}

function controls(...content) {
  return html("div", { class: "controls" }, ...content);
}
