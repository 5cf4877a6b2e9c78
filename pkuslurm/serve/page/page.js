"use strict";
// One question, an answer of each model. What a model says is only ever added as text, never as HTML.

const TEXTS = {
  zh: {
    chat: "对话", anew: "新对话", language: "English", stop: "停止", send: "发送", question: "输入问题",
    temperature: "温度", keys: "回车发送，Shift + 回车换行", prompts: "这次运行的问题", base: "基座", tuned: "微调后",
    hello: "问一个问题，或点下面的问题。", helloTwo: "问一个问题，或点下面的问题：基座模型和微调后的模型同时回答。",
    idle: (n) => `${n} 分钟没有提问就会停止`, ends: (when, left) => `作业 ${when} 到时限（还有 ${left}）`, over: (when) => `作业的时限 ${when} 已到`,
    time: (h, m) => (h ? `${h} 小时 ${m} 分` : `${m} 分钟`), busy: "正在回答", stopped: "已停止", length: "到了长度上限，没有说完", empty: "（没有说话）",
    failed: (why) => `没有答成：${why}`, none: "没有回应", cut: "连接中断", locked: "密钥不对", number: (n) => `HTTP ${n}`,
    gone: (run) => `服务没有回应：作业可能已经结束，或者 ssh 隧道断了。对话还留在这个标签页里。重新启动：pkuslurm serve ${run}（它会显示地址和密钥在哪里）。`,
    loading: "模型还在加载，好了会自动开始。",
    key: "密钥不对（重新启动的服务有新的密钥）：刷新页面，用户名随便填，密码填密钥；密钥在哪里，pkuslurm serve 有显示。",
  },
  en: {
    chat: "Chat", anew: "New conversation", language: "中文", stop: "Stop", send: "Send", question: "Ask a question",
    temperature: "Temperature", keys: "Enter sends, Shift + Enter a new line", prompts: "The run's questions", base: "Base", tuned: "Tuned",
    hello: "Ask something, or take one of the questions below.",
    helloTwo: "Ask something, or take one of the questions below: the base model and the tuned one answer at the same time.",
    idle: (n) => `stops after ${n} minutes without a question`, ends: (when, left) => `the job's time ends ${when} (${left} left)`,
    over: (when) => `the job's time ended ${when}`, time: (h, m) => (h ? `${h} h ${m} min` : `${m} min`),
    busy: "answering", stopped: "stopped", length: "cut at the limit of length", empty: "(said nothing)",
    failed: (why) => `No answer: ${why}`, none: "the server does not answer", cut: "the connection broke off", locked: "the key is refused", number: (n) => `HTTP ${n}`,
    gone: (run) => `The server does not answer: its job may have ended, or the ssh tunnel is closed. The conversation stays in this tab. To start it again: pkuslurm serve ${run} (it shows the address and where the key is).`,
    loading: "The models are still being loaded; this page goes on by itself.",
    key: "The key is refused (a server started again has a new one): reload the page; any name will do, the password is the key; pkuslurm serve shows where it is.",
  },
};

const by = (id) => document.getElementById(id);
// Not a bare relative URL: a page opened as http://x:KEY@host/ may not fetch those, they would hold the key.
const at = (path) => new URL(path, location.origin + location.pathname);
const running = new Map(); // model → what stops its answer
const shown = new WeakMap(); // answer → its elements
let info = { models: [], prompts: [] };
let talk = { turns: [], temperature: 0, draft: "" };
let trouble = null; // "gone", "key" or "loading"
let language = navigator.language.startsWith("zh") ? "zh" : "en";
const kept = (name) => { try { return sessionStorage.getItem(name); } catch { return null; } };
const keep = (name, value) => { try { sessionStorage.setItem(name, value); } catch { /* full or forbidden: the page works without */ } };
const place = () => `pkuslurm ${location.pathname} ${info.run_id}`;
const words = (name, ...values) => (typeof TEXTS[language][name] === "function" ? TEXTS[language][name](...values) : TEXTS[language][name] ?? name);

function made(tag, kind, text = "") {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  element.textContent = text;
  return element;
}

// ---- what is said

function history(model, question) {
  // a turn of which this model said nothing is as if it had not been asked: roles must alternate
  const said = talk.turns.filter((turn) => turn.answers[model]?.text);
  const turns = said.flatMap((turn) => [{ role: "user", content: turn.question }, { role: "assistant", content: turn.answers[model].text }]);
  return [...turns, { role: "user", content: question }];
}

async function ask(question) {
  if (running.size || !question.trim() || !info.models.length) return;
  const turn = { question, answers: {} };
  const asked = info.models.map((model) => [model, history(model, question)]);
  for (const model of info.models) turn.answers[model] = { text: "", state: "busy" };
  talk.turns.push(turn);
  showTurn(turn);
  by("turns").scrollTop = by("turns").scrollHeight;
  asked.forEach(([model]) => running.set(model, new AbortController()));
  showRunning();
  await Promise.all(asked.map(([model, messages]) => answer(model, messages, turn.answers[model])));
  const lost = Object.values(turn.answers).every((it) => it.state === "failed" && !it.text);
  if (lost && !by("box").value) by("box").value = question; // to be asked once more
  grow();
}

async function answer(model, messages, it) {
  const stopper = running.get(model);
  try {
    const body = JSON.stringify({ model, messages, temperature: talk.temperature, stream: true });
    const request = { method: "POST", headers: { "Content-Type": "application/json" }, body, signal: stopper.signal };
    const response = await fetch(at("v1/chat/completions"), request).catch(() => { throw { why: "none", trouble: "gone" }; });
    if (!response.ok) throw await refusal(response);
    setTrouble(null);
    it.state = (await read(response.body, (piece) => add(it, piece))) === "length" ? "length" : "done";
  } catch (error) {
    it.state = stopper.signal.aborted ? "stopped" : "failed";
    it.why = error.why ?? "cut";
    it.detail = error.detail;
    if (it.state === "failed" && error.trouble) setTrouble(error.trouble);
  }
  if (running.get(model) === stopper) running.delete(model); // a new conversation may have begun meanwhile
  following(() => showAnswer(it));
  showRunning();
  save();
}

async function refusal(response) {
  if (response.status === 401) return { why: "locked", trouble: "key" };
  const { message, code } = await response.json().then((body) => body.error ?? {}, () => ({}));
  if (code === "loading") return { why: "number", detail: message, trouble: "loading" };
  // a proxy in between (code-server's) answers for a server that is gone, in its own words
  const gone = !message && response.status >= 500 ? "gone" : undefined;
  return { why: "number", detail: message || response.status, trouble: gone };
}

async function read(body, say) {
  const reader = body.getReader(), decoder = new TextDecoder();
  let rest = "", finish = null;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (!data || data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw { why: "number", detail: chunk.error.message };
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) say(choice.delta.content);
      finish = choice?.finish_reason ?? finish;
    }
  }
  if (!finish) throw { why: "cut", trouble: "gone" };
  return finish;
}

// ---- what is shown

function showTurn(turn) {
  by("hello").hidden = true;
  const article = made("article", "answer");
  const pair = made("div", "pair");
  article.append(made("h2", "said", turn.question), pair);
  for (const [model, it] of Object.entries(turn.answers)) {
    const column = made("section", model === "tuned" ? "tuned" : "");
    const parts = { column, model, name: made("h3"), said: made("div", "said", it.text), note: made("p", "note muted") };
    parts.said.setAttribute("aria-live", "polite");
    column.append(parts.name, parts.said, parts.note);
    pair.append(column);
    shown.set(it, parts);
    showAnswer(it);
  }
  by("turns").append(article);
}

function showAnswer(it) {
  const { column, model, name, said, note } = shown.get(it);
  const why = it.why === "number" && isNaN(it.detail) ? it.detail : words(it.why, it.detail);
  const failed = it.state === "failed";
  name.textContent = words(model);
  column.setAttribute("aria-label", words(model));
  column.classList.toggle("busy", it.state === "busy");
  said.setAttribute("aria-busy", String(it.state === "busy")); // read out as a whole, once it is
  note.classList.toggle("bad", failed);
  note.textContent = { busy: "", done: it.text ? "" : words("empty"), failed: words("failed", why) }[it.state] ?? words(it.state);
}

function following(change) {
  const view = by("turns");
  const below = view.scrollHeight - view.scrollTop - view.clientHeight < 80; // whoever has scrolled up reads there
  change();
  if (below) view.scrollTop = view.scrollHeight;
}

function add(it, piece) {
  it.text += piece;
  following(() => shown.get(it).said.append(piece)); // a string: a text node
}

function showRunning() {
  by("stop").hidden = !running.size;
  by("send").disabled = running.size > 0;
  for (const button of by("prompts").querySelectorAll("button")) button.disabled = running.size > 0;
}

function setTrouble(name) {
  trouble = name;
  following(() => {
    by("trouble").hidden = !name;
    by("trouble").textContent = name ? words(name, info.run_id ?? "RUN") : "";
  });
}

function showFacts() {
  const engine = typeof info.engine === "object" && info.engine ? [info.engine.name, info.engine.version, info.engine.dtype].filter(Boolean).join(" ") : info.engine;
  const facts = [engine];
  if (info.ends) {
    const left = Math.floor((new Date(info.ends) - Date.now()) / 60000);
    const day = new Date(info.ends).toDateString() === new Date().toDateString() ? {} : { month: "short", day: "numeric" };
    const when = new Date(info.ends).toLocaleString(language, { ...day, hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
    facts.push(left < 0 ? words("over", when) : words("ends", when, words("time", Math.floor(left / 60), left % 60)));
    by("facts").classList.toggle("soon", left < 10);
  }
  if (info.idle_minutes) facts.push(words("idle", info.idle_minutes));
  by("facts").replaceChildren(...facts.filter(Boolean).map((fact) => made("span", "", fact)));
}

function showWords() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-say]")) element.textContent = words(element.dataset.say);
  for (const element of document.querySelectorAll("[data-hint]")) element.placeholder = words(element.dataset.hint);
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", words(element.dataset.label));
  if (info.models.length > 1) by("hello").textContent = words("helloTwo");
  by("language").lang = language === "zh" ? "en" : "zh-CN";
  for (const turn of talk.turns) Object.values(turn.answers).forEach(showAnswer);
  showFacts();
  setTrouble(trouble);
}

// ---- what is kept, and what the user does

function save() {
  if (info.run_id !== undefined) keep(place(), JSON.stringify({ ...talk, draft: by("box").value }));
}

function restore() {
  try { talk = { ...talk, ...JSON.parse(kept(place()) ?? "{}") }; } catch { /* not ours */ }
  for (const turn of talk.turns) {
    for (const it of Object.values(turn.answers)) if (it.state === "busy") it.state = "stopped";
    showTurn(turn);
  }
  by("box").value ||= talk.draft; // what is typed while the page loads stays
  by("temperature").value = talk.temperature;
  by("turns").scrollTop = by("turns").scrollHeight;
  grow();
}

const stop = () => running.forEach((stopper) => stopper.abort());
const grow = () => following(() => {
  by("box").rows = 1; // its content's height, once it is small
  by("box").rows = Math.min(8, Math.floor((by("box").scrollHeight - 19) / 24));
});

function send(question) {
  if (matchMedia("(pointer: fine)").matches) by("box").focus(); // on a phone that would open the keyboard again
  ask(question);
}

by("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running.size || !by("box").value.trim() || !info.models.length) return;
  const question = by("box").value.trim();
  by("box").value = "";
  grow();
  send(question);
});
by("box").addEventListener("keydown", (event) => {
  // Enter that ends the choice of a Chinese word is not for us (Safari says so by keyCode 229 only)
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  by("form").requestSubmit();
});
by("box").addEventListener("input", grow);
by("temperature").addEventListener("change", () => {
  talk.temperature = Math.min(2, Math.max(0, by("temperature").valueAsNumber || 0));
  by("temperature").value = talk.temperature;
});
by("stop").addEventListener("click", () => { stop(); by("box").focus(); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !event.isComposing) stop(); });
by("anew").addEventListener("click", () => {
  stop();
  running.clear();
  talk.turns = [];
  by("turns").replaceChildren(by("hello"));
  by("hello").hidden = false;
  showRunning();
  save();
  by("box").focus();
});
by("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  keep("pkuslurm language", language);
  showWords();
});
addEventListener("pagehide", save);
setInterval(showFacts, 30000);

async function start() {
  if (kept("pkuslurm language") in TEXTS) language = kept("pkuslurm language");
  showWords();
  try {
    const response = await fetch(at("info"));
    if (!response.ok) throw await refusal(response);
    info = { ...info, ...(await response.json()) };
  } catch (error) {
    setTrouble(error.trouble ?? "gone");
    if (trouble === "loading") setTimeout(start, 2000);
    return;
  }
  setTrouble(null);
  by("run").textContent = info.run_id ?? "";
  document.title = `${info.run_id ?? ""} · pkuslurm`;
  for (const prompt of info.prompts) {
    const item = made("li"), text = prompt.prompt ?? prompt;
    const button = made("button", "", text);
    button.type = "button";
    button.title = text;
    button.addEventListener("click", () => send(text));
    item.append(button);
    by("prompts").append(item);
  }
  restore();
  showWords();
}
start();
