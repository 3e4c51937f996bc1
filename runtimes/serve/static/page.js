// The page at "/": it polls /load and draws what it says, and asks a model what its reader types. No dependencies.

const EVERY = 1000; // milliseconds between looks at /load
const WINDOW = 10; // seconds that latencies are taken over
const STEADY = 3; // seconds that rates are taken over
const SAMPLES = 60; // of a sparkline
const MOST_LABELS = 8;

const $ = (id) => document.getElementById(id);
const state = { key: "", snapshots: [], last: null, chosen: "", controller: null, asking: false, locked: false };

/* ---- Asking the server ---- */

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, body, signal) {
  const headers = state.key ? { authorization: `Bearer ${state.key}` } : {};
  if (body !== undefined) headers["content-type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  const response = await fetch(path, {
    method, headers, signal, cache: "no-store", credentials: "omit", body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (response.ok) return response;
  if (response.status === 401) askKey(state.key !== "");
  let told = `the server answered ${response.status}`;
  try {
    const { error } = await response.json();
    told = typeof error === "string" ? error : error.message;
  } catch { /* the status is all there is */ }
  throw new Refused(response.status, told);
}

function askKey(wrong) {
  $("ask-key").hidden = false;
  state.locked = wrong || !state.key; // nothing is asked until there is another key
  if ($("key").open) return;
  $("key-told").textContent = wrong
    ? "The server does not know that key. Try another one."
    : "It is kept in this page's memory only, and gone when you close it.";
  $("key").showModal();
}

$("ask-key").addEventListener("click", () => askKey(false));
$("key-form").addEventListener("submit", () => {
  state.key = $("key-value").value.trim();
  $("key-value").value = "";
  state.locked = false;
  poll();
});

/* ---- Drawing ---- */

const make = (name, text, kind) => {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
};
const copy = (id) => $(id).content.firstElementChild.cloneNode(true);
const set = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const number = (value) => {
  if (value === null || !Number.isFinite(value)) return "–";
  if (value >= 10000) return `${Math.round(value / 1000)}k`;
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1).replace(/\.0$/, "") : value.toFixed(2).replace(/\.?0+$/, "");
};
const whole = (value) => value.toLocaleString("en-US");
const bytes = (value) => {
  for (const [size, name] of [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (value >= size) return `${(value / size).toFixed(value >= 10 * size ? 0 : 1)} ${name}`;
  }
  return value ? `${value} B` : "–";
};
const span = (seconds) => {
  for (const [size, name] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (seconds >= size) return `${Math.floor(seconds / size)} ${name}`;
  }
  return `${Math.floor(seconds)} s`;
};
const milliseconds = (seconds) => (seconds === null ? null : seconds * 1000);

/* ---- Load ---- */

const TILES = [
  { name: "Requests", unit: "/s", of: (rates) => rates.requests },
  { name: "Tokens", unit: "/s", of: (rates) => rates.tokens },
  { name: "Median latency", unit: "ms", of: (rates) => milliseconds(rates.median) },
  { name: "99th percentile", unit: "ms", of: (rates) => milliseconds(rates.slow) },
  { name: "Waiting", unit: "requests", of: (rates) => rates.waiting },
];
for (const tile of TILES) {
  tile.node = copy("tile");
  tile.node.querySelector("h3").textContent = tile.name;
  tile.node.querySelector(".unit").textContent = tile.unit;
  tile.values = Array(SAMPLES).fill(null);
  $("tiles").append(tile.node);
}

function totals(load) {
  const sum = { at: load.now, done: 0, tokens: 0, counts: load.bounds.map(() => 0).concat(0), waiting: 0 };
  for (const { stats } of load.models) {
    sum.done += stats.done;
    sum.tokens += stats.tokens_in + stats.tokens_out;
    sum.waiting += stats.queue_requests;
    stats.total_seconds.counts.forEach((count, index) => { sum.counts[index] += count; });
  }
  return sum;
}

function quantile(counts, bounds, share) {
  const all = counts.reduce((sum, count) => sum + count, 0);
  if (!all) return null;
  let left = share * all;
  for (let index = 0; index < counts.length; index += 1) {
    if (left <= counts[index] && counts[index]) {
      const low = index ? bounds[index - 1] : 0;
      const high = index < bounds.length ? bounds[index] : low * 2;
      return low + (high - low) * (left / counts[index]);
    }
    left -= counts[index];
  }
  return bounds.at(-1);
}

function rates(load) {
  const now = totals(load);
  const { snapshots } = state;
  // A server that began anew counts from nought, and so does this page.
  if (snapshots.length && (now.done < snapshots.at(-1).done || now.at < snapshots.at(-1).at)) snapshots.length = 0;
  snapshots.push(now);
  while (snapshots.length > 2 && now.at - snapshots[1].at >= WINDOW) snapshots.shift();
  const old = snapshots[0];
  const before = snapshots.findLast((one) => now.at - one.at >= STEADY) ?? old;
  const seconds = now.at - before.at;
  const rate = (name) => (seconds > 0 ? (now[name] - before[name]) / seconds : null);
  const counts = now.counts.map((count, index) => count - old.counts[index]);
  return {
    requests: rate("done"), tokens: rate("tokens"), waiting: now.waiting,
    median: quantile(counts, load.bounds, 0.5), slow: quantile(counts, load.bounds, 0.99),
  };
}

function drawTiles(load) {
  const found = rates(load);
  for (const tile of TILES) {
    const value = tile.of(found);
    tile.values.push(value);
    tile.values.shift();
    set(tile.node.querySelector(".value"), number(value));
    const top = Math.max(...tile.values.map((one) => one ?? 0), 1e-9);
    const points = tile.values.map((one, index) => (one === null ? null : [index * 120 / (SAMPLES - 1), 30 - 26 * one / top]));
    const known = points.filter(Boolean);
    const line = known.length > 1 ? `M${known.map((point) => point.map((one) => one.toFixed(1)).join(" ")).join("L")}` : "";
    tile.node.querySelector(".line").setAttribute("d", line);
    tile.node.querySelector(".area").setAttribute("d", line && `${line}L${known.at(-1)[0].toFixed(1)} 32L${known[0][0].toFixed(1)} 32Z`);
  }
}

/* ---- Models ---- */

const LOOKS = { ready: "good", starting: "warn", idle: "", broken: "bad", closed: "" };
const SAID = { ready: "ready", starting: "starting", idle: "asleep", broken: "does not load", closed: "closed" };
const cards = new Map();

function drawModels(load) {
  if (!cards.size) $("models").replaceChildren();
  const names = new Set(load.models.map((model) => model.name));
  for (const [name, card] of cards) {
    if (!names.has(name)) { card.remove(); cards.delete(name); }
  }
  for (const model of load.models) {
    if (!cards.has(model.name)) {
      const card = copy("card");
      card.querySelector("h3").textContent = model.name;
      cards.set(model.name, card);
      $("models").append(card);
    }
    drawCard(cards.get(model.name), model);
  }
  if (!load.models.length) $("models").replaceChildren(make("p", "No model is loaded yet.", "quiet"));
}

function drawCard(card, model) {
  const { stats } = model;
  set(card.querySelector(".task"), model.task.replaceAll("-", " "));
  set(card.querySelector(".digest"), model.digest.replace("sha256:", "").slice(0, 12));
  card.querySelector(".digest").title = `${model.architecture} ${model.digest}`.trim();
  card.querySelector(".failure").hidden = !model.failure;
  set(card.querySelector(".failure"), model.failure ? `A newer bundle lies there and could not be loaded: ${model.failure}` : "");
  const unit = model.task === "tensors" ? "rows/s" : "tokens/s";
  const rows = stats.workers.map((worker) => {
    const row = make("tr");
    const where = [worker.provider.replace("ExecutionProvider", "") || "–", worker.device].filter((one, index, all) => one && all.findIndex((other) => other.toLowerCase() === one.toLowerCase()) === index);
    const condition = make("td", undefined, LOOKS[worker.state]);
    condition.append(make("span", undefined, "dot"), SAID[worker.state] ?? worker.state);
    if (worker.restarts) condition.append(`, replaced ${worker.restarts}×`);
    condition.title = worker.error;
    row.append(
      make("td", where.join(" · ")), make("td", worker.variant || "–"), condition,
      make("td", worker.throughput ? `${number(worker.throughput)} ${unit}` : "–", "n"),
      make("td", model.task === "text-generation" ? `${worker.active} texts` : whole(worker.outstanding), "n"),
      make("td", bytes(worker.rss), "n"),
    );
    return row;
  });
  card.querySelector("tbody").replaceChildren(...rows);
  drawWhy(card, model);
  drawCounts(card.querySelector(".counts"), stats);
}

function drawWhy(card, model) {
  const list = card.querySelector(".why");
  const because = model.why.filter((line) => line.startsWith("because")).map((line) => line.replace(/^because\s*/, ""));
  const told = [...new Set(because)].map((reason) => ["why here", reason]);
  for (const one of model.variants) told.push([one.variant, `${one.precision}, ${bytes(one.bytes)}; ${one.proof}`]);
  const all = model.why.join("\n");
  const text = JSON.stringify([told, all]);
  if (list.dataset.told === text) return;
  list.dataset.told = text;
  list.replaceChildren(...told.flatMap(([name, value]) => [make("dt", name), make("dd", value)]));
  card.querySelector("details").hidden = !all;
  set(card.querySelector("details pre"), all);
}

function drawCounts(list, stats) {
  const saved = stats.workers.reduce((sum, worker) => sum + worker.tokens_saved, 0);
  const told = [
    ["answered", stats.done], ["tokens read", stats.tokens_in], ["tokens written", stats.tokens_out], ["from the cache", stats.cache_hits],
    ["prompt tokens not read again", saved], ["refused", stats.refused], ["too late", stats.deadline_missed], ["failed", stats.failed],
  ].filter(([name, value], index) => value || index < 2);
  list.replaceChildren(...told.map(([name, value]) => {
    const pair = make("div");
    pair.append(make("dt", name), make("dd", whole(value)));
    return pair;
  }));
}

function say(kind, text) {
  $("state").className = `state ${kind}`;
  set($("state").querySelector(".said"), text);
}

async function poll() {
  if (state.asking || state.locked) return;
  state.asking = true;
  try {
    const load = await (await ask("/load")).json();
    state.last = load;
    say(load.draining ? "warn" : load.ready ? "good" : "warn", load.draining ? "ending" : load.ready ? "ready" : "starting");
    set($("facts"), `up ${span(load.uptime)} · ${whole(load.requests)} requests · ${bytes(load.rss)}`);
    drawTiles(load);
    drawModels(load);
    drawTry(load);
    document.body.dataset.loaded = "yes";
  } catch (error) {
    say("bad", error instanceof Refused ? (error.status === 401 ? "locked" : error.message) : "the server cannot be reached");
  } finally {
    state.asking = false;
  }
}

/* ---- Trying a model ---- */

function drawTry(load) {
  const names = load.models.map((model) => model.name);
  const listed = [...$("model").options].map((option) => option.value);
  if (JSON.stringify(names) === JSON.stringify(listed)) return;
  $("model").replaceChildren(...names.map((name) => new Option(name, name)));
  $("pick").hidden = names.length < 2;
  if (!names.includes(state.chosen)) state.chosen = names[0] ?? "";
  $("model").value = state.chosen;
  openPanel();
}

$("model").addEventListener("change", () => {
  state.chosen = $("model").value;
  openPanel();
});

const PANELS = {
  "text-generation": ["panel-generate", generatePanel],
  "feature-extraction": ["panel-embed", embedPanel],
  "text-classification": ["panel-classify", classifyPanel],
  "token-classification": ["panel-rows", (panel, model) => rowsPanel(panel, model, { text: ["Text", "Ada Lovelace lived in London."] })],
  "fill-mask": ["panel-rows", (panel, model) => rowsPanel(panel, model, { text: ["Text", `The sky is ${model.mask} today.`] })],
  "question-answering": ["panel-rows", (panel, model) => rowsPanel(panel, model, {
    question: ["Question", "Where does the river rise?"], context: ["Context", "The river rises in the hills and runs to the sea."],
  })],
  tensors: ["panel-tensors", tensorsPanel],
};

function openPanel() {
  state.controller?.abort();
  const model = state.last.models.find((one) => one.name === state.chosen);
  if (!model) {
    $("panel").replaceChildren(make("p", "Here you can ask a model something once one is there.", "quiet"));
    return;
  }
  const [template, fill] = PANELS[model.task];
  const panel = make("div"); // of its own: what an earlier one still waits for is drawn nowhere
  panel.append($(template).content.cloneNode(true));
  $("panel").replaceChildren(panel);
  fill(panel, model);
}

function told(panel, text, bad = false) {
  const node = panel.querySelector(".told");
  node.className = bad ? "told bad" : "told";
  node.textContent = text;
}

// Runs `work` while the button is off; says how long it took, or what went wrong.
async function timed(panel, work) {
  const button = panel.querySelector("button.main");
  const begin = performance.now();
  state.controller?.abort();
  const controller = new AbortController();
  state.controller = controller;
  button.disabled = true;
  told(panel, "…");
  try {
    const more = await work(controller.signal);
    told(panel, [more, `${number(performance.now() - begin)} ms`].filter(Boolean).join(" · "));
  } catch (error) {
    if (!controller.signal.aborted) told(panel, error.message, true);
  } finally {
    button.disabled = false;
  }
}

const count = (many, name) => `${whole(many)} ${name}${many === 1 ? "" : "s"}`;

function bars(entries, most) {
  const grid = make("div", undefined, "bars");
  for (const [name, value] of entries) {
    const bar = make("span", undefined, "bar");
    const fill = make("i");
    fill.style.width = `${Math.max(0, Math.min(1, value / most)) * 100}%`;
    bar.append(fill);
    grid.append(make("span", name, "name"), bar, make("span", value.toFixed(3)));
  }
  return grid;
}

function embedPanel(panel, model) {
  const form = panel.querySelector("form");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    timed(panel, async (signal) => {
      const input = [form.elements.first.value, form.elements.second.value];
      const found = await (await ask("/v1/embeddings", { model: model.name, input }, signal)).json();
      const [a, b] = found.data.map((one) => one.embedding);
      const dot = (x, y) => x.reduce((sum, value, index) => sum + value * y[index], 0);
      const similarity = dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
      const line = make("p", `${similarity.toFixed(3)} `, "big");
      line.append(make("small", `cosine similarity, of vectors with ${a.length} numbers`));
      const bar = make("div", undefined, "bar");
      const fill = make("i");
      fill.style.width = `${Math.max(0, similarity) * 100}%`;
      bar.append(fill);
      panel.querySelector(".result").replaceChildren(line, bar);
      return count(found.usage.prompt_tokens, "token");
    });
  });
}

function classifyPanel(panel, model) {
  const form = panel.querySelector("form");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    timed(panel, async (signal) => {
      const found = await (await ask("/classify", { model: model.name, texts: [form.elements.text.value] }, signal)).json();
      const scores = Object.entries(found.results[0].scores).sort((a, b) => b[1] - a[1]);
      const parts = [bars(scores.slice(0, MOST_LABELS), Math.max(1, ...scores.map((one) => one[1])))];
      if (scores.length > MOST_LABELS) parts.push(make("p", `and ${scores.length - MOST_LABELS} more`, "quiet"));
      panel.querySelector(".result").replaceChildren(...parts);
      return count(found.usage.tokens, "token");
    });
  });
}

function rowsPanel(panel, model, fields) {
  const form = panel.querySelector("form");
  const made = Object.entries(fields).map(([name, [label, text]]) => {
    const node = make("label", `${label} `);
    const area = make("textarea", text);
    Object.assign(area, { name, rows: 2, required: true });
    node.append(area);
    return node;
  });
  panel.querySelector(".fields").replaceChildren(...made);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    timed(panel, async (signal) => {
      const inputs = Object.keys(fields).map((name) => ({ name, shape: [1], datatype: "BYTES", data: [form.elements[name].value] }));
      const found = await (await ask(`/v2/models/${path(model.name)}/infer`, { inputs }, signal)).json();
      const row = JSON.parse(found.outputs.find((output) => output.name === "result").data[0]);
      panel.querySelector(".result").replaceChildren(make("pre", JSON.stringify(row, null, 2)));
      return "";
    });
  });
}

const path = (name) => name.split("/").map(encodeURIComponent).join("/");

async function tensorsPanel(panel, model) {
  const place = `/v2/models/${path(model.name)}`;
  let described;
  try {
    described = await (await ask(place)).json();
  } catch (error) {
    told(panel, error.message, true);
    return;
  }
  const inputs = described.inputs.map(({ name, datatype, shape }) => {
    const extents = shape.map((extent) => (extent < 0 ? 1 : extent));
    const size = extents.reduce((product, extent) => product * extent, 1);
    return { name, datatype, shape: extents, size };
  });
  const small = inputs.map(({ name, datatype, shape, size }) => ({ name, datatype, shape, data: size > 8 ? "…" : Array(size).fill(1) }));
  panel.querySelector("pre").textContent = `POST ${location.origin}${place}/infer\n${JSON.stringify({ inputs: small })}`;
  panel.querySelector("button").addEventListener("click", () => timed(panel, async (signal) => {
    const full = inputs.map(({ name, datatype, shape, size }) => ({ name, datatype, shape, data: Array(size).fill(datatype === "BOOL" ? true : 1) }));
    const found = await (await ask(`${place}/infer`, { inputs: full }, signal)).json();
    const lines = found.outputs.map(({ name, datatype, shape, data }) => {
      const first = data.slice(0, 8).map((value) => (typeof value === "number" ? Number(value.toPrecision(5)) : value));
      return `${name}  ${datatype} [${shape.join(", ")}]\n${first.join("  ")}${data.length > 8 ? "  …" : ""}`;
    });
    panel.querySelector(".result").replaceChildren(make("pre", lines.join("\n\n")));
    return "";
  }));
}

/* ---- Texts, streamed ---- */

// The JSON documents of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split(/\r?\n\r?\n/);
    held = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

function generatePanel(panel, model) {
  const form = panel.querySelector("form");
  const log = panel.querySelector(".log");
  const area = form.querySelector("textarea");
  const stop = form.querySelector(".stop");
  const messages = [];
  if (!model.chat) area.placeholder = "Begin a text. The model has no chat template, and goes on with what you write.";

  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  stop.addEventListener("click", () => state.controller?.abort());
  form.querySelector(".clear").addEventListener("click", () => {
    state.controller?.abort();
    messages.length = 0;
    log.replaceChildren();
    told(panel, "");
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = area.value;
    if (!text.trim() || form.querySelector("button.main").disabled) return;
    area.value = "";
    write(text);
  });

  async function write(text) {
    const user = make("div", text, "turn user");
    const answer = make("div", "", "turn assistant writing");
    log.append(user, answer);
    messages.push({ role: "user", content: text });
    const begin = performance.now();
    const controller = new AbortController();
    state.controller = controller;
    stop.hidden = false;
    form.querySelector("button.main").disabled = true;
    let first = 0;
    let usage = null;
    const told_ = () => {
      const seconds = (performance.now() - begin - first) / 1000;
      const speed = usage && usage.completion_tokens > 1 && seconds > 0 ? `${number((usage.completion_tokens - 1) / seconds)} tokens/s` : "";
      return [first ? `first token after ${number(first)} ms` : "", usage ? count(usage.completion_tokens, "token") : "", speed].filter(Boolean).join(" · ");
    };
    told(panel, "reading…");
    try {
      const options = {
        model: model.name, stream: true, stream_options: { include_usage: true },
        temperature: form.elements.temperature.valueAsNumber || 0, max_tokens: form.elements.tokens.valueAsNumber || 200,
      };
      const response = model.chat
        ? await ask("/v1/chat/completions", { ...options, messages }, controller.signal)
        : await ask("/v1/completions", { ...options, prompt: text }, controller.signal);
      for await (const piece of events(response)) {
        if (piece.error) throw new Error(piece.error.message ?? piece.error);
        if (piece.usage) usage = piece.usage;
        const choice = piece.choices?.[0];
        const more = choice ? (choice.delta ? choice.delta.content : choice.text) : "";
        if (!more) continue;
        if (!first) { first = performance.now() - begin; told(panel, "writing…"); }
        const low = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
        answer.append(more);
        if (low) log.scrollTop = log.scrollHeight;
      }
      told(panel, told_());
    } catch (error) {
      if (controller.signal.aborted) told(panel, ["stopped", told_()].filter(Boolean).join(" · "));
      else told(panel, error.message, true);
      if (!answer.textContent) { answer.remove(); user.remove(); messages.pop(); area.value = area.value || text; }
    } finally {
      answer.classList.remove("writing");
      if (answer.textContent) messages.push({ role: "assistant", content: answer.textContent });
      stop.hidden = true;
      form.querySelector("button.main").disabled = false;
    }
  }
}

/* ---- Begin ---- */

poll();
setInterval(() => { if (!document.hidden) poll(); }, EVERY);
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
