// The circuit page: fills header and controls from its data, and ties them and the panel to the Bokeh figure.
"use strict";

const circuitPage = (() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const points = [...data.nodes, ...data.marks];
  const numbers = new Map(points.map((point, i) => [point.name, i]));
  const strengths = data.edges.map(([, , weight]) => Math.abs(weight)).sort((a, b) => a - b);
  let current = null; // the number of the chosen point
  let figure = null; // the Bokeh models, by the names that circuit_figure.py gives them

  const { make, note, number } = elements;
  const panel = circuitPanel(data, choose);
  const byId = (id) => document.getElementById(id);

  function fillHeader() {
    const { task, facts } = data;
    const fact = ([key, value]) => make("span", {}, make("i", { textContent: key }), ` ${value}`);
    byId("header").append(
      make("h1", {}, make("code", { textContent: task.name }), " ", make("small", { textContent: task.description })),
      make("p", { className: "facts" }, ...Object.entries(facts).map(fact)),
      ...(data.readings.length ? [tiles()] : []),
      ...(data.cautions.length ? [cautions()] : []),
      ...(data.readings.length ? [meanings()] : []),
    );
  }

  const tiles = () => make("div", { className: "tiles", id: "measures" }, ...data.readings.map(tile));

  const tile = (reading) =>
    make(
      "div", { className: "tile", title: reading.meaning },
      make("b", { textContent: reading.label }),
      make("strong", { textContent: reading.value }),
      make("small", { textContent: reading.control }),
    );

  const cautions = () =>
    make("div", { className: "cautions" }, make("b", { textContent: "Read with care" }),
      make("ul", {}, ...data.cautions.map((text) => make("li", { textContent: text }))));

  function meanings() {
    const row = (r) => [make("dt", { textContent: r.label }), make("dd", { textContent: r.meaning })];
    const rows = make("dl", {}, ...data.readings.flatMap(row));
    return make("details", {}, make("summary", { textContent: "What these numbers mean" }), rows);
  }

  function fillControls() {
    const search = make("input", { type: "search", id: "search", placeholder: "find a node, e.g. mlp_act:12" });
    search.setAttribute("aria-label", "Find a node");
    search.setAttribute("list", "names");
    search.addEventListener("change", () => find(search.value));
    const slider = make("input", { type: "range", id: "threshold", min: 0, max: 100, value: 0 });
    slider.disabled = !data.edges.length;
    slider.addEventListener("input", () => setThreshold(Number(slider.value) / 100));
    const links = make("input", { type: "checkbox", id: "links", checked: true });
    links.addEventListener("change", () => { figure.links_drawn.visible = links.checked; });
    const form = byId("controls");
    form.addEventListener("submit", (event) => { event.preventDefault(); find(search.value); });
    form.append(
      search,
      make("datalist", { id: "names" }, ...points.map((point) => make("option", { value: point.name }))),
      make("label", {}, "hide weak edges ", slider),
      make("output", { id: "n_shown" }),
      make("label", {}, links, " links that are not edges"),
      legend(),
    );
  }

  const legend = () =>
    make(
      "span", { className: "legend" },
      make("span", { className: "key positive" }), "positive weight ",
      make("span", { className: "key negative" }), "negative ",
      make("span", { className: "key dashed" }), "residual stream, query and key, logits: not counted as edges",
    );

  /** Choose the node of this name, or else the one with the shortest name that ends so or contains it. */
  function find(text) {
    const wanted = text.trim();
    if (!wanted) return;
    const shorter = (a, b) => a.length - b.length;
    const names = points.map((point) => point.name).filter((name) => name.includes(wanted)).sort(shorter);
    const found = numbers.has(wanted) ? wanted : (names.find((name) => name.endsWith(wanted)) ?? names[0]);
    byId("search").setCustomValidity(found ? "" : "no node of this circuit has such a name");
    byId("search").reportValidity();
    if (found) choose(numbers.get(found));
  }

  /** Hide this share of the edges, the weakest first. */
  function setThreshold(share) {
    const n_hidden = Math.round(share * strengths.length);
    const threshold = n_hidden === 0 ? 0 : (strengths[n_hidden] ?? Infinity);
    const shown = data.edges.flatMap(([, , weight], i) => (Math.abs(weight) >= threshold ? [i] : []));
    figure.edges_shown.indices = shown;
    const limit = n_hidden && shown.length ? `, |weight| ≥ ${number(threshold)}` : "";
    byId("n_shown").textContent = `${shown.length} of ${data.edges.length} edges${limit}`;
  }

  /** Called by Bokeh when the selection of nodes or marks has changed; both change on one tap. */
  function tapped() {
    clearTimeout(tapped.later);
    tapped.later = setTimeout(() => {
      const [node] = figure.nodes.selected.indices;
      const [mark] = figure.marks.selected.indices;
      choose(node ?? (mark === undefined ? null : data.nodes.length + mark));
    }, 0);
  }

  /** Show a point's panel and what it is connected with; null goes back to the overview. */
  function choose(i) {
    if (i === current) return;
    current = i;
    const n = data.nodes.length;
    figure.nodes.selected.indices = i !== null && i < n ? [i] : [];
    figure.marks.selected.indices = i !== null && i >= n ? [i - n] : [];
    highlight(i);
    panel.show(i);
    byId("search").value = i === null ? "" : points[i].name;
    history.replaceState(null, "", i === null ? location.pathname + location.search : `#${points[i].name}`);
  }

  function highlight(i) {
    const { nodes, marks, edges, links, chosen, labels } = figure;
    const near = i === null ? null : new Set([i, ...neighbours(i)]);
    const [x, y, track] = ["x", "y", "track"].map((key) => [...nodes.data[key], ...marks.data[key]]);
    const opacity = points.map((_, j) => (near === null || near.has(j) ? 1 : 0.25));
    nodes.data = { ...nodes.data, alpha: opacity.slice(0, data.nodes.length) };
    marks.data = { ...marks.data, alpha: opacity.slice(data.nodes.length) };
    edges.data = { ...edges.data, alpha: i === null ? figure.edgeAlpha : edgeOpacity(i) };
    const linked = i === null ? figure.linkAlpha : linkOpacity(links.data, [points[i].name, track[i]]);
    links.data = { ...links.data, alpha: linked };
    chosen.data = i === null ? { x: [], y: [] } : { x: [x[i]], y: [y[i]] };
    labels.data = near === null ? figure.labelled : labelsOf([...near].filter((j) => j < data.nodes.length), x, y);
  }

  const edgeOpacity = (i) => data.edges.map(([a, b]) => (a === i || b === i ? 0.95 : 0.07));
  const linkOpacity = ({ source, target, track }, wanted) =>
    track.map((t, j) => ([source[j], target[j], t].some((name) => wanted.includes(name)) ? 1 : 0.15));

  const labelsOf = (shown, x, y) => ({
    x: shown.map((j) => x[j]),
    y: shown.map((j) => y[j]),
    text: shown.map((j) => points[j].name.split(":")[1]),
  });

  const neighbours = (i) => [...data.edges, ...data.links].flatMap(([a, b]) => (a === i ? [b] : b === i ? [a] : []));

  /** The models of a Bokeh document that the page works with, by name. */
  function models(document_) {
    const names = ["nodes", "marks", "edges", "links", "chosen", "labels", "edges_shown", "links_drawn"];
    const found = Object.fromEntries(names.map((name) => [name, document_.get_model_by_name(name)]));
    const [edgeAlpha, linkAlpha] = [found.edges, found.links].map((source) => [...source.data.alpha]);
    return { ...found, edgeAlpha, linkAlpha, labelled: { ...found.labels.data } };
  }

  async function start() {
    fillHeader();
    fillControls();
    byId("below").append(panel.table(), note(`Page format ${data.format}.`));
    panel.show(null);
    await Bokeh.embed.embed_item(JSON.parse(byId("figure-data").textContent));
    figure = models(Bokeh.documents[0]);
    setThreshold(0);
    addEventListener("keydown", (event) => { if (event.key === "Escape") choose(null); });
    addEventListener("hashchange", followAddress);
    followAddress();
    document.body.dataset.ready = "yes";
  }

  function followAddress() {
    const i = numbers.get(decodeURIComponent(location.hash.slice(1)));
    if (i !== undefined) choose(i);
  }

  return { start, tapped };
})();

circuitPage.start();
