"use strict";
// What is shown of others' names goes through textContent, or through `escaped` where plotly takes
// text: it reads <b>, <br> and <a href> in it.
const page = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const element = (id) => document.getElementById(id);
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
const config = {
  responsive: true, displaylogo: false, showSendToCloud: false, modeBarButtonsToRemove: ["select2d", "lasso2d"],
};
const hasPlotly = typeof Plotly !== "undefined";

function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function percent(share) {
  if (share === null) return "unknown";
  if (share >= 0.9995 && share < 1) return ">\u00a099.9\u00a0%";
  if (share > 0 && share < 0.0005) return "<\u00a00.1\u00a0%";
  return (100 * share).toFixed(1) + "\u00a0%";
}

// Charts

function layout(more) {
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), automargin: true };
  const isNarrow = window.innerWidth < 760;  // where a finger on a chart is to move the page
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("ink") },
    margin: { l: 48, r: 12, t: 8, b: 36 }, dragmode: isNarrow ? false : "zoom",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("quiet"), activecolor: colour("accent") },
    hoverlabel: { namelength: -1, bgcolor: colour("raised"), bordercolor: colour("line"), font: { color: colour("ink") } },
    ...more,
    xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis },
  };
}

function drawCurves(id, lines, yaxis) {
  if (!element(id)) return;
  const shown = lines.filter(([, values]) => values.some((value) => value !== null));
  const shades = ["accent", "second", "quiet"].map(colour);
  const traces = shown.map(([name, values], number) => ({
    name, x: page.epochs, y: values, mode: page.epochs.length > 40 ? "lines" : "lines+markers",
    line: { color: shades[number % 3], width: 2 }, marker: { size: 6 },
  }));
  const few = page.epochs.length <= 10;
  Plotly.react(id, traces, layout({
    hovermode: "x unified", hoverdistance: -1, showlegend: shown.length > 1,
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
    xaxis: { title: { text: "epoch" }, ...(few ? { dtick: 1, tick0: 0 } : {}) }, yaxis,
  }), config);
}

function drawAllCurves() {
  if (!page.curves) return;
  const curves = page.curves;
  drawCurves("chart-loss", [["training", curves.train_loss], [page.images, curves.evaluated_loss]], { hoverformat: ".4f" });
  const accuracy = [[page.images, curves.accuracy], [page.images + ", " + page.tta, curves.accuracy_tta]];
  if (page.classes.length > 5) accuracy.push([page.images + ", among the best five", curves.top5]);
  drawCurves("chart-accuracy", accuracy, { tickformat: ".4~%", hoverformat: ".2%" });
  drawCurves("chart-rate", [["learning rate", curves.learning_rate]], { hoverformat: ".3~g", exponentformat: "power", rangemode: "tozero" });
  drawCurves("chart-speed", [["images/s", curves.images_per_second]], { hoverformat: ",.0f", rangemode: "tozero" });
}

// Of runs that are compared: one chart for each figure, one colour for each group of runs.

const withoutMiddle = (name) => (name.length > 28 ? name.slice(0, 12) + "…" + name.slice(-15) : name);
const hiddenGroups = new Set();
const dashes = ["solid", "dash", "dot", "dashdot"];

function drawCompared() {
  (page.charts || []).forEach((chart, number) => {
    const shown = chart.lines.filter((line) => !hiddenGroups.has(line.group));
    const few = Math.max(...chart.lines.map((line) => line.epochs.length)) <= 10;
    const traces = shown.map((line) => ({
      name: escaped(withoutMiddle(line.name)), x: line.epochs, y: line.values, mode: line.epochs.length > 40 ? "lines" : "lines+markers",
      line: { color: colour("series-" + (line.group % 8)), width: 2, dash: dashes[Math.floor(line.group / 8) % 4] }, marker: { size: 6 },
    }));
    Plotly.react("compared-" + number, traces, layout({
      hovermode: shown.length > 8 ? "closest" : "x unified", hoverdistance: shown.length > 8 ? 20 : -1, showlegend: false,
      xaxis: { title: { text: "epoch" }, ...(few ? { dtick: 1, tick0: 0 } : {}) },
      yaxis: { exponentformat: "power", ...chart.axis },
    }), config);
  });
}

function drawCalibration() {
  if (!element("chart-calibration")) return;
  const points = {
    x: page.bins.map((bin) => bin[1]), y: page.bins.map((bin) => bin[2]), mode: "lines+markers",
    line: { color: colour("accent"), width: 2 }, marker: { size: 8 },
    text: page.bins.map((bin) => `${bin[0].toLocaleString("en")} images: ${percent(bin[1])} said, ${percent(bin[2])} right`),
    hoverinfo: "text",
  };
  const diagonal = { x: [0, 1], y: [0, 1], mode: "lines", hoverinfo: "skip", line: { color: colour("quiet"), dash: "dot", width: 1 } };
  const axis = { range: [0, 1.03], tickformat: ".0%" };
  Plotly.react("chart-calibration", [diagonal, points], layout({
    showlegend: false, hovermode: "closest",
    xaxis: { ...axis, title: { text: "probability of the answer" } },
    yaxis: { ...axis, title: { text: "right" } },
  }), config);
}

// The matrix

const totals = new Map();
const inCell = new Map();
for (const [truth, found, images] of page.matrix || []) {
  totals.set(truth, (totals.get(truth) || 0) + images);
  inCell.set(truth + "," + found, images);
}
const ofCell = new Map();
(page.pictures || []).forEach((picture, number) => {
  const key = picture[1] + "," + picture[2];
  ofCell.set(key, [...(ofCell.get(key) || []), number]);
});

const hexOf = (name) => colour(name).match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16));

function between(share) {
  const [low, high] = [hexOf("raised"), hexOf("cell")];
  return "rgb(" + low.map((value, place) => Math.round(value + share * (high[place] - value))).join(",") + ")";
}

function describeCell(truth, found) {
  const images = inCell.get(truth + "," + found) || 0, total = totals.get(truth) || 0;
  const verb = truth === found ? "recognized" : "taken for " + page.classes[found];
  const share = total ? ` (${percent(images / total)})` : "";
  return `${page.classes[truth]} ${verb}: ${images.toLocaleString("en")} of ${total.toLocaleString("en")}${share}`;
}

const MOST_CELLS = 3000;  // that are drawn as points, where a cell is less than a pixel or two

function drawMatrix() {
  const matrix = element("matrix");
  if (!matrix || !page.matrix.length) return;
  const number = page.classes.length;
  const step = Math.ceil(number / Math.max(10, Math.floor((matrix.clientWidth - 140) / 20)));  // names beside it, and at 45 degrees
  const ticks = page.classes.map((name, place) => place).filter((place) => place % step === 0);
  const names = ticks.map((place) => escaped(short(page.classes[place])));
  const axis = { type: "linear", tickvals: ticks, ticktext: names, showgrid: false, zeroline: false, ticks: "" };
  const isNarrow = matrix.clientWidth < 480;
  Plotly.react(matrix, [number <= 200 ? asCells(matrix, number) : asPoints()], layout({
    height: Math.min(620, Math.max(260, matrix.clientWidth)), margin: { l: 8, r: 8, t: 8, b: 8 },
    hovermode: "closest",
    xaxis: { ...axis, tickangle: -45, title: { text: "taken for" }, range: [-0.5, number - 0.5] },
    yaxis: { ...axis, range: [number - 0.5, -0.5], ...(isNarrow ? { tickfont: { size: 10 } } : {}) },
  }), config);
  if (matrix.dataset.listens) return;
  matrix.dataset.listens = "yes";
  matrix.on("plotly_hover", (event) => showTip(event));
  matrix.on("plotly_unhover", () => { element("tip").hidden = true; });
  matrix.on("plotly_click", (event) => showCell(event.points[0].y, event.points[0].x));
}

const shadeOf = ([truth, , images]) => Math.sqrt(images / totals.get(truth));  // so that the rare is seen
const shades = () => [0, 0.25, 0.5, 0.75, 1].map((share) => [share, between(share)]);

function asCells(matrix, number) {
  const rows = Array.from({ length: number }, () => new Array(number).fill(0));
  const texts = rows.map((row) => row.map(() => ""));
  for (const cell of page.matrix || []) {
    rows[cell[0]][cell[1]] = shadeOf(cell);
    texts[cell[0]][cell[1]] = String(cell[2]);
  }
  const size = Math.max(8, Math.min(15, matrix.clientWidth / (number + 2) / 4));
  const isSmall = number <= 20;
  return {
    type: "heatmap", z: rows, zmin: 0, zmax: 1, colorscale: shades(), showscale: false,
    xgap: isSmall ? 1 : 0, ygap: isSmall ? 1 : 0, hoverinfo: "none",
    ...(isSmall ? { text: texts, texttemplate: "%{text}", textfont: { size } } : {}),
  };
}

function asPoints() {
  const cells = [...page.matrix].sort((one, other) => other[2] - one[2]).slice(0, MOST_CELLS);
  if (cells.length < page.matrix.length) {
    element("matrix-part").hidden = false;
    element("matrix-part").textContent = `The ${cells.length.toLocaleString("en")} cells with the most images, of ${page.matrix.length.toLocaleString("en")}.`;
  }
  const scale = shades().map(([share]) => [share, between(0.35 + 0.65 * share)]);
  return {
    type: "scatter", mode: "markers", x: cells.map((cell) => cell[1]), y: cells.map((cell) => cell[0]), hoverinfo: "none",
    marker: { symbol: "square", size: 4, color: cells.map(shadeOf), colorscale: scale, cmin: 0, cmax: 1, line: { width: 0 } },
  };
}

const short = (name) => (name.length > 16 ? name.slice(0, 15) + "…" : name);

function showTip({ points, event }) {
  const tip = element("tip");
  tip.textContent = describeCell(points[0].y, points[0].x);
  tip.hidden = false;
  const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 6);
  tip.style.left = Math.max(6, left) + "px";
  tip.style.top = Math.max(6, event.clientY - tip.offsetHeight - 12) + "px";
}

function showCell(truth, found) {
  const place = element("cell"), kept = ofCell.get(truth + "," + found) || [];
  const cards = make("div", "cards");
  for (const number of kept) cards.append(cardOf(number));
  const many = kept.length === 0 ? "no picture of these is kept" : kept.length === 1 ? "1 picture is kept" : `${kept.length} pictures are kept`;
  place.replaceChildren(make("h3", "", describeCell(truth, found)), make("p", "quiet", many), cards);
}

function pictureOf(number) {
  const made = make("span", "picture"), [width, height] = page.size;
  made.style.backgroundPosition = `-${(number % page.columns) * width}px -${Math.floor(number / page.columns) * height}px`;
  return made;
}

function cardOf(number) {
  const [name, truth, found, probability, ofTruth] = page.pictures[number];
  const card = make("figure", "card"), caption = make("figcaption");
  let said = percent(probability);
  if (truth !== found) said = `${page.classes[found]}\u00a0${said}, ${page.classes[truth]}\u00a0${percent(ofTruth)}`;
  const label = make("span", "line quiet name", name);
  label.title = name;
  caption.append(make("span", "line", said), label);
  card.append(pictureOf(number), caption);
  return card;
}

// The samples

function drawSamples() {
  const slider = element("epoch"), samples = page.samples;
  if (!slider) return;
  const number = Number(slider.value), rows = samples.best[number], cards = element("sample-cards");
  element("epoch-shown").textContent = samples.epochs[number];
  slider.setAttribute("aria-valuetext", "epoch " + samples.epochs[number]);
  const known = rows.filter((scores, place) => samples.truth[place] !== null && scores.length);
  const right = rows.filter((scores, place) => scores.length && scores[0][0] === samples.truth[place]);
  element("samples-right").textContent = known.length ? `${right.length} of ${known.length} are right.` : "";
  cards.replaceChildren(...rows.map((scores, place) => sampleCard(scores, place)));
}

function nameOfClass(place) {
  return place in page.classes ? page.classes[place] : "class " + place;
}

function sampleCard(scores, place) {
  const truth = page.samples.truth[place], picture = page.samples.pictures[place];
  const card = make("figure", "card"), caption = make("figcaption"), list = make("div", "scores");
  if (picture !== null) card.append(pictureOf(picture));
  if (truth !== null) {
    const isRight = scores.length > 0 && scores[0][0] === truth;
    caption.append(make("strong", "", nameOfClass(truth) + " "), make("span", isRight ? "verdict right" : "verdict wrong", isRight ? "✓" : "✗"));
  }
  for (const [found, thousandths] of scores) {
    const name = make("span", "", nameOfClass(found)), share = thousandths / 10;
    name.title = nameOfClass(found);
    name.className = found === truth ? "truth" : "answer";
    name.style.setProperty("--share", share + "%");
    list.append(name, make("span", "share", share.toFixed(0) + " %"));
  }
  const label = make("span", "line quiet name", page.samples.names[place]);
  label.title = page.samples.names[place];
  caption.append(list, label);
  card.append(caption);
  return card;
}

// The page

function draw() {
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  element("theme").textContent = isDark ? "light" : "dark";
  if (!hasPlotly) return;
  drawAllCurves();
  drawCompared();
  drawMatrix();
  drawCalibration();
}

function remembered(theme) {
  try {  // a browser may forbid it to a page from a file
    if (theme) localStorage.setItem("theme", theme);
    return localStorage.getItem("theme") || "";
  } catch { return ""; }
}

element("theme").addEventListener("click", () => {
  root.dataset.theme = element("theme").textContent;
  remembered(root.dataset.theme);
  draw();
});
for (const button of document.querySelectorAll("[data-more]"))
  button.addEventListener("click", () => {
    element(button.dataset.more).classList.add("all");
    button.remove();
  });
for (const button of document.querySelectorAll("[data-cell]"))
  button.addEventListener("click", () => showCell(...button.dataset.cell.split(",").map(Number)));
for (const button of document.querySelectorAll("[data-group]"))
  button.addEventListener("click", () => {
    const group = Number(button.dataset.group), isShown = hiddenGroups.delete(group);
    if (!isShown) hiddenGroups.add(group);
    button.setAttribute("aria-pressed", isShown);
    if (hasPlotly) drawCompared();
  });
element("epoch")?.addEventListener("input", drawSamples);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
let width = window.innerWidth, waiting = 0;
window.addEventListener("resize", () => {
  if (window.innerWidth === width) return;  // a phone's address bar came or went
  width = window.innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(draw, 150);
});
let themeOnScreen = "";
window.addEventListener("beforeprint", () => { themeOnScreen = root.dataset.theme || ""; root.dataset.theme = "light"; draw(); });
window.addEventListener("afterprint", () => {
  if (themeOnScreen) root.dataset.theme = themeOnScreen; else delete root.dataset.theme;
  draw();
});

if (remembered()) root.dataset.theme = remembered();
if (element("no-script")) element("no-script").hidden = hasPlotly;
draw();
drawSamples();
if (reloadSeconds) setTimeout(() => location.reload(), 1000 * reloadSeconds);
