// Numbers for people, and the scales and ticks of axes.

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function superscript(text) {
  return [...text].map((sign) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[sign] || (sign === "-" ? "⁻" : "")).join("");
}

function short(value) {
  if (!isNumber(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) {
    const [digits, exponent] = value.toExponential(2).split("e");
    const power = `10${superscript(exponent)}`;
    return Number(digits) === 1 ? power : `${Number(digits)}×${power}`.replace("-", "−");
  }
  return String(size >= 1000 ? Math.round(value) : Number(value.toPrecision(3))).replace("-", "−");
}

function fixed(value, digits = 2) {
  return isNumber(value) ? value.toFixed(digits).replace("-", "−") : "–";
}

// A number below 1 as it fits into a small cell: .12
function tight(value) {
  return isNumber(value) ? fixed(value).replace(/^(−?)0\./, "$1.") : "";
}

function percent(value, digits = 1) {
  return isNumber(value) ? `${fixed(100 * value, digits)}\u202f%` : "–";
}

function ratio(value) {
  return isNumber(value) ? `${Number((100 * value).toPrecision(3))}\u202f%` : "–";
}

const SHAPES = { linear: (value) => value, log: Math.log10, sqrt: Math.sqrt };

function scale([low, high], [from, to], kind = "linear") {
  const shape = SHAPES[kind];
  const [least, most] = [shape(low), shape(high)];
  return (value) => from + ((shape(value) - least) / (most - least || 1)) * (to - from);
}

// The least and greatest of lists of numbers, null where there is none; a logarithm needs those above zero.
function extent(lists, kind = "linear") {
  let [low, high] = [Infinity, -Infinity];
  for (const list of lists) {
    for (const value of list || []) {
      if (!isNumber(value) || (kind === "log" && value <= 0)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return low <= high ? [low, high] : null;
}

function niceStep(span, most) {
  const rough = span / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999);
}

function linearTicks([low, high], most = 5) {
  if (!(high > low)) return [low];
  const step = niceStep(high - low, most);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) {
    ticks.push(Number((i * step).toPrecision(10)));
  }
  return ticks;
}

function logTicks([low, high], most = 6) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const every = Math.max(1, Math.ceil((last - first) / most));
  const factors = last - first <= 2 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let power = first; power <= last; power += every) {
    ticks.push(...factors.map((factor) => Number((factor * 10 ** power).toPrecision(3))));
  }
  return ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
}

// An axis from zero, or from the lowest negative value, to a round number above the highest.
function fromZero(range, most = 5) {
  if (!range) return [0, 1];
  const [low, high] = [Math.min(0, range[0]), Math.max(0, range[1])];
  if (low === high) return [0, 1];
  const step = niceStep(high - low, most);
  return [Math.floor(low / step + 1e-9) * step, Math.ceil(high / step - 1e-9) * step];
}
