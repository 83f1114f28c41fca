// The panel beside the picture: the overview, or one point with its weights and the text it responds to.
"use strict";

/** The panel of a page's data; `choose` is called with the number of a point that the reader goes to. */
function circuitPanel(data, choose) {
  const { make, note, number, signed, signClass, quoted, visible, heat } = elements;
  const points = [...data.nodes, ...data.marks];
  const LISTED = 12; // rows of a list before "show all"
  const GUIDE =
    "Each circle is a channel of a site that the circuit keeps; darker, if the task suffers more without it. " +
    "The model runs from top to bottom. A channel of the residual stream has the same column in every row. " +
    "Click a circle for its weights and for the text it responds to; Ctrl and the wheel zoom, Escape leaves a node.";

  /** Show a point, or the overview for null. */
  function show(i) {
    const panel = document.getElementById("panel");
    panel.replaceChildren(...(i === null ? overview() : details(points[i], i)));
    panel.scrollTop = 0;
  }

  function overview() {
    const best = byEffect().slice(0, LISTED).filter((i) => points[i].effect !== null);
    return [
      make("h2", { textContent: "How to read this" }),
      make("p", { textContent: GUIDE }),
      make("h2", { textContent: "Nodes that matter most" }),
      best.length ? null : note("Effects of nodes were not measured; a greater effect_units when pruning has them."),
      list(best, (i) => nodeRow(i, number(points[i].effect))),
      make("h2", { textContent: "The task" }),
      pairs(null),
    ].filter((element) => element !== null);
  }

  function byEffect() {
    const effect = (i) => data.nodes[i].effect ?? -Infinity;
    return data.nodes.map((_, i) => i).sort((a, b) => (effect(a) === effect(b) ? a - b : effect(b) - effect(a)));
  }

  function details(point, i) {
    const title = make("h2", { id: "chosen" }, make("code", { textContent: point.name }));
    const close = make("button", { type: "button", className: "close", textContent: "×" });
    close.title = "Back to the overview";
    close.addEventListener("click", () => choose(null));
    const words = make("p", { textContent: point.words });
    return [close, title, words, ...connections(i), ...tokens(point), ...(point.corpus ? activity(point) : [])];
  }

  function activity(node) {
    const scale = Math.max(...allValues(node).map(Math.abs), 1e-9);
    return [
      make("h2", { textContent: "On the task's prompts" }),
      note(`Activation in the full model, held-out pairs; ${legendOf(scale)}`),
      pairs(node, scale),
      make("h2", { textContent: "On held-out text" }),
      note(`Highest peaks in ${data.windows.length} windows of ${data.windows_of}, full model, one from a window; same colours.`),
      ...snippets("Most positive", node.corpus.positive, scale),
      ...snippets("Most negative", node.corpus.negative, scale),
    ];
  }

  const legendOf = (scale) =>
    `blue positive, red negative, full colour ±${number(scale)}. Point at a token for its value.`;
  const allValues = (node) =>
    [...node.prompts, ...[...node.corpus.positive, ...node.corpus.negative].map((snippet) => snippet.values)].flat();

  function connections(i) {
    const point = points[i];
    const edges = (end) => data.edges.filter((edge) => edge[1 - end] === i).map((edge) => [edge[end], edge[2]]);
    const links = (end, kind) =>
      data.links.filter((link) => link[1 - end] === i && link[2] === kind).map((link) => [link[end], link[3]]);
    const pair = [...links(0, "qk"), ...links(1, "qk")];
    const head = data.nodes.flatMap((n, j) => (j !== i && "head" in n && sameHead(n, point) ? [[j, null]] : []));
    return [
      point.corpus ? facts(point) : null,
      point.corpus || point.name.startsWith("embed:") ? copyButton(point) : null,
      ...section("Incoming edges", edges(0), point.corpus),
      ...section("Outgoing edges", edges(1), point.corpus),
      ...section("Residual stream: written before by", links(0, "residual")),
      ...section("Residual stream: read later by", links(1, "residual")),
      ...section("To the logits (unembedding × gain of the norm)", links(1, "unembed")),
      ...section("From the final residual (unembedding × gain of the norm)", links(0, "unembed")),
      ...section("Query and key of this pair", pair),
      ...section("Others of this head", head),
    ].filter((element) => element !== null);
  }

  const layerOf = (point) => point.name.split(".")[1];
  const sameHead = (a, b) => "head" in b && a.head === b.head && layerOf(a) === layerOf(b);

  const replacementWords = {
    mean_data: "when it is ablated: its mean over the training corpus",
    mean_task: "when it is ablated: its mean over the task's prompts",
    zero: "when it is ablated",
    resample: "on average, when it is ablated: its value at a random place of the corpus",
  };

  function facts(node) {
    const effect = node.effect === null ? "not measured" : signed(node.effect);
    const active = `active on ${number(100 * node.corpus.active, 2)}% of tokens`;
    const rows = [
      ["Effect", effect, "rise of the held-out task loss when this node is ablated too"],
      ["Replaced by", number(node.replacement), replacementWords[data.facts.ablation]],
      ["On the corpus", active, `mean ${number(node.corpus.mean)}`],
    ];
    const row = ([label, value, why]) =>
      [make("dt", { textContent: label }), make("dd", {}, make("b", { textContent: value }), ` ${why}`)];
    return make("dl", { className: "node" }, ...rows.flatMap(row));
  }

  function section(title, ends, always = false) {
    if (!ends.length && !always) return [];
    const sorted = [...ends].sort(([a, v], [b, w]) => Math.abs(w ?? 0) - Math.abs(v ?? 0) || a - b);
    const strongest = Math.abs(sorted[0]?.[1] ?? 0);
    return [
      make("h3", { textContent: `${title} (${ends.length})` }),
      list(sorted, ([j, weight]) => nodeRow(j, weight === null ? "" : signed(weight), weight, strongest)),
    ];
  }

  /** A list that shows its first rows, and the others on demand. */
  function list(items, row) {
    const element = make("div", { className: "rows" }, ...items.slice(0, LISTED).map(row));
    if (items.length > LISTED) {
      const textContent = `show all ${items.length}`;
      const more = make("button", { type: "button", className: "more", textContent });
      more.addEventListener("click", () => element.replaceChildren(...items.map(row)));
      element.append(more);
    }
    return element;
  }

  /** A row that goes to a node when clicked; with a bar as long as its weight. */
  function nodeRow(i, value, weight = null, strongest = 0) {
    const row = make(
      "button", { type: "button", className: weight === null ? "row plain" : "row", title: points[i].words },
      make("code", { textContent: points[i].name }), make("span", { className: "value", textContent: value }),
    );
    if (weight !== null) {
      const bar = make("span", { className: `bar ${signClass(weight)}` });
      bar.style.width = `${Math.max(2, (70 * Math.abs(weight)) / strongest)}px`;
      row.append(make("span", { className: "track" }, bar));
    }
    row.dataset.node = points[i].name;
    row.addEventListener("click", () => choose(i));
    return row;
  }

  function copyButton(point) {
    const [site, channel] = point.name.split(":");
    const code = [
      "import sparsetrain, torch",
      "",
      `model, tokenizer = sparsetrain.load(${quoted(data.load_from)})`,
      `tokens = torch.tensor([tokenizer.encode(${quoted(data.prompts[0].tokens.join(""))}).ids])`,
      `logits, seen = model.run(tokens, read=[${quoted(site)}])`,
      `activation = seen[${quoted(site)}][..., ${channel}]  # (1, number of tokens)`,
    ].join("\n");
    const button = make("button", { type: "button", id: "copy", textContent: "copy" });
    const shown = make("pre", { className: "python", textContent: code });
    button.addEventListener("click", () => copy(code, button, shown));
    const summary = make("summary", { textContent: "Read this node in Python" });
    return make("details", { className: "copy" }, summary, button, shown);
  }

  /** Put text on the clipboard; where the browser does not let a local file do so, select it instead. */
  async function copy(text, button, shown) {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(shown);
      button.textContent = "selected: press Ctrl+C";
    }
  }

  function tokens(point) {
    if (!point.tokens) return [];
    const embeds = point.name.startsWith("embed:");
    const title = embeds ? "Tokens whose embedding has most weight on it" : "Tokens whose logit it moves most";
    const chip = ([text, weight]) =>
      make(
        "span", { className: "chip" }, make("code", { textContent: visible(text) }),
        make("small", { className: signClass(weight), textContent: signed(weight) }),
      );
    return [make("h3", { textContent: title }), make("p", { className: "chips" }, ...point.tokens.map(chip))];
  }

  /** The task's pairs side by side, coloured by a node's activation if there is one. */
  function pairs(node, scale) {
    const element = make("div", { className: "pairs" },
      make("b", { textContent: "positive side" }), make("b", { textContent: "negative side" }));
    data.prompts.forEach((prompt, i) => {
      const text = heat(prompt.tokens, node ? node.prompts[i] : null, scale);
      const title = `right answer ${quoted(prompt.answer)}, wrong answer ${quoted(prompt.wrong)}`;
      text.append(make("span", { className: "answer", textContent: visible(prompt.answer), title }));
      element.append(text);
    });
    return element;
  }

  function snippets(title, found, scale) {
    const shown = found.map(({ window, start, peak, values }) => {
      const texts = data.windows[window].slice(start, start + values.length).map((token) => data.vocabulary[token]);
      return heat(texts, values, scale, peak);
    });
    const none = note("none: it is never on this side of zero");
    return [make("h3", { textContent: title }), ...(shown.length ? shown : [none])];
  }

  /** A table of all nodes by effect, for those who look for one or use the keyboard. */
  function table() {
    const degree = points.map(() => [0, 0]);
    for (const [a, b] of data.edges) {
      degree[a][1] += 1;
      degree[b][0] += 1;
    }
    const titles = ["node", "", "effect", "edges in", "edges out"];
    const head = make("tr", {}, ...titles.map((text) => make("th", { textContent: text })));
    const rows = byEffect().map((i) => {
      const button = make("button", { type: "button", className: "name" }, make("code", { textContent: points[i].name }));
      button.addEventListener("click", () => {
        choose(i);
        document.getElementById("picture").scrollIntoView({ block: "start" });
      });
      const cells = [points[i].words, number(points[i].effect), ...degree[i]];
      return make("tr", {}, make("td", {}, button), ...cells.map((text) => make("td", { textContent: text })));
    });
    const summary = make("summary", { textContent: `All ${data.nodes.length} nodes, by effect` });
    const cells = make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
    return make("details", { id: "all_nodes" }, summary, cells);
  }

  return { show, table };
}
