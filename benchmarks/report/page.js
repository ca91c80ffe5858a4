"use strict";
// The page of a report: filters, plots and the table, all from the JSON in the element `data`.

const data = JSON.parse(document.getElementById("data").textContent);
const FILTERS = data.filters;
const AXES = { T: { panels: "E", fixed: "K" }, E: { panels: "T", fixed: "K" }, K: { panels: "E", fixed: "T" } };
const TITLES = data.titles;
const QUANTITIES = {
  median_ms: { title: "median time, ms", low: "p20_ms", high: "p80_ms", limit: "limit_ms" },
  relative: { title: "time / time of the fastest" },
  efficiency_percent: { title: "efficiency, % of the limit" },
  tokens_per_s: { title: "tokens per second" },
};
const MEMORY = {
  peak_mib: { title: "peak above the inputs, MiB" },
  saved_mib: { title: "kept for the backward, MiB" },
};
const COLUMNS = [
  "implementation", "status", "layer", "load", "mode", "dtype", "T", "E", "K", "median_ms", "p20_ms", "p80_ms",
  "relative", "limit_ms", "efficiency", "tokens_per_s", "tflop_per_s", "peak_memory_bytes",
  "saved_for_backward_bytes", "compile_ms", "worst_error_fraction", "rounds", "reason",
];
const element = (id) => document.getElementById(id);
const distinct = (rows, column) =>
  [...new Set(rows.map((row) => row[column]))].sort((a, b) => (a > b) - (a < b));
const plots = {};
let order = { column: null, descending: false };

function fill(id, values, labels, wanted) {
  const select = element(id);
  const chosen = wanted ?? select.value;
  select.replaceChildren(...values.map((value) => new Option(labels ? labels[value] : value, value)));
  select.value = values.map(String).includes(String(chosen)) ? chosen : values[0];
}

const middle = (values) => values[Math.floor(values.length / 2)];
const shown = () => data.rows.filter((row) => FILTERS.every((name) => row[name] === element(name).value));
const timed = () => shown().filter((row) => row.status === "ok");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const isDark = () => document.documentElement.dataset.theme === "dark";

// Each filter offers what is there under the filters before it.
function fillFilters() {
  let rows = data.rows;
  for (const name of FILTERS) {
    const values = distinct(rows, name);
    const common = (value) => rows.filter((row) => row[name] === value).length;
    const most = values.reduce((a, b) => (common(b) > common(a) ? b : a), values[0]);
    fill(name, values, null, values.includes(element(name).value) ? element(name).value : most);
    rows = rows.filter((row) => row[name] === element(name).value);
  }
}

function fillSizes() {
  const rows = timed();
  const axes = Object.keys(AXES).filter((axis) => distinct(rows, axis).length > 1);
  fill("axis", axes.length ? axes : ["T"], TITLES);
  const { fixed } = AXES[element("axis").value];
  const values = distinct(rows, fixed);
  element("fixed-label").textContent = fixed;
  const same = element("fixed").dataset.size === fixed && values.map(String).includes(element("fixed").value);
  fill("fixed", values, null, same ? element("fixed").value : middle(values));
  element("fixed").dataset.size = fixed;
  const K = distinct(rows, "K");
  fill("heat-K", K, null, K.map(String).includes(element("heat-K").value) ? undefined : middle(K));
}

function config() {
  const text = { labelColor: css("--ink"), titleColor: css("--ink") };
  return {
    background: null,
    axis: { ...text, gridColor: css("--line"), domainColor: css("--faint"), tickColor: css("--faint") },
    legend: { ...text, orient: "bottom", columns: Math.max(1, Math.floor(innerWidth / 210)), symbolLimit: 40 },
    header: text,
    view: { stroke: css("--line") },
  };
}

function styles(rows) {
  const present = new Set(rows.map((row) => row.implementation));
  const used = data.styles.filter((style) => present.has(style.name));
  const colour = (style) => (isDark() && style.colour === "#000000" ? "#ffffff" : style.colour);
  const domain = used.map((style) => style.name);
  const encode = (range) => ({
    field: "implementation", type: "nominal", title: null, scale: { domain, range },
  });
  return { color: encode(used.map(colour)), shape: encode(used.map((style) => style.shape)) };
}

async function draw(id, rows, spec, options = {}) {
  plots[id]?.finalize();
  delete plots[id];
  const place = element(id);
  if (!rows.length) {
    place.innerHTML = `<p class="empty">${options.empty ?? "No timed row matches this choice."}</p>`;
    return;
  }
  const whole = { data: { name: "rows", values: rows }, config: config(), ...spec };
  plots[id] = await vegaEmbed(place, whole, { actions: false, renderer: "svg", mode: "vega-lite" });
}

const log = (field, title) => ({
  field, title, type: "quantitative", scale: { type: "log", nice: false }, axis: { tickCount: 6, format: "~r" },
});
const sizeAxis = (rows, axis) => ({
  field: axis, title: TITLES[axis], type: "quantitative", scale: { type: "log", base: 2, nice: false },
  axis: { values: distinct(rows, axis), format: "d", grid: true },
});
const tooltip = (...columns) => [
  { field: "implementation" },
  ...["T", "E", "K"].map((field) => ({ field, type: "quantitative", format: "d" })),
  ...columns.map(([field, title]) => ({ field, title, type: "quantitative", format: ".4~g" })),
];

function lines(id, quantity, name) {
  const axis = element("axis").value;
  const { panels, fixed } = AXES[axis];
  const value = Number(element("fixed").value);
  const rows = timed().filter((row) => row[fixed] === value && row[name] !== null);
  const count = distinct(rows, panels).length;
  const room = element(id).clientWidth - 70;
  const columns = Math.max(1, Math.min(count, Math.floor(room / 260)));
  const x = sizeAxis(rows, axis);
  const linear = rows.some((row) => row[name] <= 0); // such as nothing kept for a backward
  const y = linear ? { field: name, title: quantity.title, type: "quantitative" } : log(name, quantity.title);
  const { color, shape } = styles(rows);
  const layer = [
    { mark: { type: "line", strokeWidth: 1.8 }, encoding: { x, y, color } },
    {
      mark: { type: "point", filled: true, size: 55, opacity: 1 },
      encoding: {
        x, y, color, shape,
        tooltip: tooltip([name, quantity.title], ["relative", "time / fastest"], ["limit_ms", "limit, ms"]),
      },
    },
  ];
  if (quantity.low) {
    const band = { y: { ...y, field: quantity.low }, y2: { field: quantity.high } };
    layer.push({ mark: { type: "area", opacity: 0.1, tooltip: null }, encoding: { x, ...band, color } });
  }
  if (quantity.limit) {
    const line = { type: "line", strokeDash: [5, 4], color: css("--faint") };
    layer.push({
      mark: line, encoding: { x, y: { ...y, field: quantity.limit, aggregate: "median", title: quantity.title } },
    });
  }
  return draw(id, rows, {
    description: `${quantity.title} against ${TITLES[axis]}, one panel for each ${panels}, ${fixed} = ${value}`,
    facet: { field: panels, type: "ordinal", title: `${TITLES[panels]} (${fixed} = ${value})` },
    columns,
    spec: { width: Math.max(150, Math.floor(room / columns) - 50), height: 240, layer },
    resolve: { axis: { x: "independent" } },
  });
}

function heat() {
  const K = Number(element("heat-K").value);
  const cells = new Map();
  for (const row of timed().filter((r) => r.K === K)) {
    const key = `${row.T} ${row.E}`;
    cells.set(key, [...(cells.get(key) ?? []), row]);
  }
  const dark = new Set(data.white_on);
  const colours = Object.fromEntries(data.styles.map((style) => [style.name, style.colour]));
  const best = [...cells.values()].map((rows) => {
    const [first, next] = rows.sort((a, b) => a.median_ms - b.median_ms);
    const tied = next !== undefined && next.p20_ms <= first.p80_ms;
    const ink = isDark() && colours[first.implementation] === "#000000" ? "#000000"
      : dark.has(colours[first.implementation]) ? "#ffffff" : "#000000";
    const label = `${tied ? "≈ " : ""}${first.implementation}`;
    return {
      ...first, label, ink, time: `${number(first.median_ms)} ms`, next: next?.implementation ?? "",
      next_ratio: next ? next.median_ms / first.median_ms : null,
    };
  });
  const x = { field: "E", type: "ordinal", title: TITLES.E, axis: { labelAngle: 0 } };
  const y = { field: "T", type: "ordinal", title: TITLES.T, sort: "descending" };
  const text = (field, dy) => ({
    mark: { type: "text", dy, fontSize: 11, limit: cell - 6 },
    encoding: { x, y, text: { field }, color: { field: "ink", type: "nominal", scale: null } },
  });
  const count = Math.max(1, distinct(best, "E").length);
  const cell = Math.max(64, Math.min(150, Math.floor((element("heat").clientWidth - 80) / count)));
  return draw("heat", best, {
    description: `The fastest implementation for each T and E at K = ${K}`,
    width: { step: cell }, height: { step: 46 },
    resolve: { scale: { color: "independent" } },
    layer: [
      {
        mark: { type: "rect", stroke: css("--panel"), strokeWidth: 2 },
        encoding: {
          x, y, color: styles(best).color,
          tooltip: [
            ...tooltip(["median_ms", "median, ms"], ["next_ratio", "next / fastest"]), { field: "next" },
          ],
        },
      },
      text("label", -7), text("time", 9),
    ],
  });
}

function roof() {
  const rows = timed().map((row) => ({
    ...row, intensity: row.flops / (row.read_bytes + row.written_bytes), gflop_per_s: 1e3 * row.tflop_per_s,
  }));
  const median = (column) => middle(distinct(rows, column));
  const found = rows.map((row) => row.intensity);
  const [low, high] = [Math.min(...found) / 2, Math.max(...found) * 2];
  const peak = 1e3 * (median("gemm_square_tflop_per_s") ?? 0);
  const bandwidth = median("read_gb_per_s");
  const roofs = [low, Math.min(Math.max(peak / bandwidth, low), high), high].map((intensity) => ({
    intensity, gflop_per_s: Math.min(peak, bandwidth * intensity),
  }));
  const x = log("intensity", "FLOPs per byte");
  const y = log("gflop_per_s", "GFLOP/s");
  return draw("roof", rows, {
    description: "Throughput against arithmetic intensity, below the measured roofline",
    width: Math.max(220, element("roof").clientWidth - 90), height: 320,
    layer: [
      {
        data: { values: roofs },
        mark: { type: "line", color: css("--faint"), strokeWidth: 2 },
        encoding: { x, y },
      },
      {
        mark: { type: "point", filled: true, size: 45, opacity: 0.8 },
        encoding: {
          x, y, ...styles(rows),
          tooltip: tooltip(["gflop_per_s", "GFLOP/s"], ["intensity", "FLOPs per byte"],
            ["efficiency_percent", "efficiency, %"], ["compute_limit_ms", "compute limit, ms"],
            ["traffic_limit_ms", "traffic limit, ms"]),
        },
      },
    ],
  });
}

function stages() {
  const range = data.colours.filter((colour) => colour !== "#000000"); // unseen on a dark page
  const order = data.stage_names;
  return draw("stages", data.stages, {
    description: "Time of each stage of profiled calls",
    width: Math.max(200, element("stages").clientWidth - 40), height: { step: 22 },
    facet: { row: { field: "call", type: "nominal", title: null, header: { labelAngle: 0, labelAlign: "left", labelOrient: "top", labelAnchor: "start" } } },
    spec: {
      width: Math.max(180, element("stages").clientWidth - 130), height: { step: 22 },
      mark: "bar",
      encoding: {
        y: { field: "pass", type: "nominal", title: null },
        x: { field: "ms", type: "quantitative", title: "time, ms", stack: "zero" },
        color: { field: "stage", type: "nominal", title: null, scale: { domain: order, range }, sort: order },
        tooltip: [{ field: "stage" }, { field: "pass" }, { field: "ms", format: ".4~g" }],
      },
    },
    resolve: { scale: { x: "independent" } },
  }, { empty: "No profile lies beside this report: <code>python -m benchmarks profile</code> makes them." });
}

function number(value) {
  if (typeof value !== "number") return value ?? "";
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) < 1000 ? String(Number(value.toPrecision(3))) : String(Math.round(value));
}

function table() {
  const which = element("rows-which").value;
  const rows = which === "shown" ? shown() : data.rows.filter((row) => which === "all" || row.status !== "ok");
  if (order.column) {
    const sign = order.descending ? -1 : 1;
    const key = (row) => row[order.column];
    const compare = (a, b) => (key(a) === null) - (key(b) === null) || sign * ((key(a) > key(b)) - (key(a) < key(b)));
    rows.sort(compare);
  }
  const heads = COLUMNS.map((column) => {
    const head = document.createElement("th");
    const button = document.createElement("button");
    head.scope = "col";
    button.type = "button";
    button.dataset.column = column;
    button.textContent = column;
    if (order.column === column) {
      head.ariaSort = order.descending ? "descending" : "ascending";
      button.textContent += order.descending ? " ▾" : " ▴";
    }
    head.append(button);
    return head;
  });
  const head = document.createElement("tr");
  head.append(...heads);
  const body = rows.map((row) => {
    const line = document.createElement("tr");
    line.className = row.status === "ok" ? "" : "failed";
    line.title = `${row.run_id}, measured ${row.time_utc} at commit ${row.git_commit.slice(0, 12)}, ${row.setting}`;
    line.append(...COLUMNS.map((column) => {
      const cell = document.createElement("td");
      const value = row[column];
      cell.textContent = number(value);
      cell.dataset.column = column;
      cell.dataset.value = value ?? "";
      if (typeof value === "number") {
        cell.className = "number";
        cell.title = String(value);
      }
      return cell;
    }));
    return line;
  });
  element("rows").tHead.replaceChildren(head);
  element("rows").tBodies[0].replaceChildren(...body);
  const ok = rows.filter((row) => row.status === "ok").length;
  element("rows-count").textContent = `${rows.length} of ${data.rows.length} rows, ${ok} of them ok.`;
}

let running = Promise.resolve();
function render() {
  fillFilters();
  fillSizes();
  table();
  running = running.then(() => Promise.all([
    lines("lines", QUANTITIES[element("quantity").value], element("quantity").value),
    lines("memory", MEMORY[element("memory-quantity").value], element("memory-quantity").value),
    heat(), roof(), stages(),
  ]));
  return running;
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  element("theme").textContent = name === "dark" ? "Light" : "Dark";
  element("theme").ariaPressed = String(name === "dark");
}

const titles = (quantities) => Object.fromEntries(Object.entries(quantities).map(([k, v]) => [k, v.title]));
fill("quantity", Object.keys(QUANTITIES), titles(QUANTITIES));
fill("memory-quantity", Object.keys(MEMORY), titles(MEMORY));
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
for (const select of document.querySelectorAll("select")) select.addEventListener("change", render);
element("theme").addEventListener("click", () => { setTheme(isDark() ? "light" : "dark"); render(); });
element("rows").addEventListener("click", ({ target }) => {
  const { column } = target.dataset;
  if (target.tagName !== "BUTTON") return;
  order = { column, descending: order.column === column && !order.descending };
  table();
  element("rows").querySelector(`button[data-column="${column}"]`).focus();
});
let width = innerWidth;
let waiting;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(render, 150);
});
window.page = { plots, data, ready: render() };
