"use strict";
const $ = id => document.getElementById(id);
const markdown = markdownit({html: false, breaks: true}).disable("image");
const FENCE_ENDS = /^[ >]*(`{3,}|~{3,})[ \t]*$/m;
const SETTINGS = ["system", "temperature", "limit"];
let model;            // the model's name
let turns = [];       // the chat: of each turn question, drafts, thinking, text, kinds of both, ending, usage, metrics
let writing = null;   // the AbortController of the answer that is being written

// The Content-Security-Policy allows no style attributes.
for (const rule of ["th_open", "td_open"]) {
  markdown.renderer.rules[rule] = (tokens, index, options, env, renderer) => {
    for (const attribute of tokens[index].attrs ?? []) {
      if (attribute[0] === "style") attribute.splice(0, 2, "align", attribute[1].replace("text-align:", ""));
    }
    return renderer.renderToken(tokens, index, options);
  };
}

function add(parent, tag, className, text = "") {
  const child = parent.appendChild(document.createElement(tag));
  child.className = className;
  child.textContent = text;
  return child;
}

/**
 * Text in which accepted drafts are green.
 *
 * kinds: for each UTF-16 unit of the text "a" if drafts had guessed it, "o" if the full model wrote it.
 */
function painted(text, kinds, className = "accepted") {
  const fragment = new DocumentFragment();
  for (const {0: run, index} of kinds.matchAll(/a+|o+/g)) {
    const part = text.slice(index, index + run.length);
    if (run[0] === "a") add(fragment, "span", className, part);
    else fragment.append(part);
  }
  return fragment;
}

/** Paint the words of rendered Markdown: a word has the kinds of the next occurrence in the source. */
function paint(content, source, kinds) {
  const walker = document.createTreeWalker(content, NodeFilter.SHOW_TEXT);
  const nodes = [];
  while (walker.nextNode()) nodes.push(walker.currentNode);
  let position = 0;
  for (const node of nodes.filter(node => node.data.trim())) {
    let found = "";
    for (const word of node.data.match(/\s+|\S+/g)) {
      const start = word.trim() ? source.indexOf(word, position) : -1;
      if (start >= 0) position = start + word.length;
      found += start >= 0 ? kinds.slice(start, position) : (found.at(-1) ?? "o").repeat(word.length);
    }
    node.replaceWith(painted(node.data, found));
  }
}

/** The elements of Markdown tokens. */
function rendered(tokens, env, source, kinds) {
  const template = document.createElement("template");
  template.innerHTML = markdown.renderer.render(tokens, markdown.options, env);
  const {content} = template;
  paint(content, source, kinds);
  for (const link of content.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noreferrer";
  }
  for (const pre of content.querySelectorAll("pre")) {
    const box = document.createElement("div");
    box.className = "code";
    const bar = add(box, "div", "bar");
    add(bar, "span", "", pre.firstChild.className.replace("language-", ""));
    add(bar, "button", "copy", "Copy").type = "button";
    pre.replaceWith(box);
    box.append(pre);
  }
  return content;
}

/**
 * An answer that is being written.
 *
 * Complete lines are Markdown. The line that is being written is plain text, because half a mark would flicker. New
 * lines only change the last block, so only that is rendered again; lines of code are appended to it.
 */
class Answer {
  constructor(element) {
    this.env = {};           // link definitions
    this.text = "";          // the last block, and the line that is being written
    this.kinds = "";
    this.written = 0;        // start of that line in `text`
    this.tail = add(element, "div", "tail");
    this.line = add(element, "div", "line");
    this.pending = add(this.line, "span", "draft pending");
    this.pending.ariaHidden = true;
  }

  /** Thinking comes before the answer, and is folded away. */
  think(text, kinds) {
    if (!this.thought) {
      const details = document.createElement("details");
      add(details, "summary", "", "Thinking");
      this.thought = add(details, "div", "");
      this.tail.before(details);
    }
    this.thought.append(painted(text, kinds, "accepted confirmed"), this.pending);
  }

  write(text, kinds) {
    if (this.pending.parentElement === this.thought) this.line.append(this.pending);
    this.text += text;
    this.kinds += kinds;
    this.#append(text, kinds);
    if (text.includes("\n")) this.#endLines();
  }

  end() {
    this.#show(this.text);
    this.tail.replaceWith(...this.tail.childNodes);
    this.pending.remove();
    this.line.remove();
  }

  #append(text, kinds) {
    this.pending.before(painted(text, kinds, "accepted confirmed"));
  }

  #endLines() {
    const end = this.text.lastIndexOf("\n") + 1;
    const isCode = this.pending.parentElement !== this.line;
    if (!isCode || FENCE_ENDS.test(this.text.slice(this.written, end))) {
      const removed = this.#show(this.text.slice(0, end));
      this.text = this.text.slice(removed);
      this.kinds = this.kinds.slice(removed);
      this.written = end - removed;
      this.#append(this.text.slice(this.written), this.kinds.slice(this.written));
    } else {
      this.written = end;
    }
  }

  /** Render the last block again. Returns the length of the earlier blocks, which are final. */
  #show(source) {
    const tokens = markdown.parse(source, this.env);
    const last = Math.max(0, tokens.findLastIndex(({level, nesting}) => level === 0 && nesting >= 0));
    const lines = source.split(/(?<=\n|\r(?!\n))/);
    const start = last ? lines.slice(0, tokens[last].map[0]).join("").length : 0;
    this.tail.before(rendered(tokens.slice(0, last), this.env, source.slice(0, start), this.kinds.slice(0, start)));
    this.line.replaceChildren(this.pending);
    this.tail.replaceChildren(rendered(tokens.slice(last), this.env, source.slice(start), this.kinds.slice(start)));
    const fence = tokens.findLast(({nesting}) => nesting === 0);
    if (fence?.type === "fence") {
      const isOpen = fence.map[1] - fence.map[0] < 2
        || !lines[fence.map[1] - 1].replace(/^[ >]*/, "").startsWith(fence.markup);
      if (isOpen) [...this.tail.querySelectorAll("code")].at(-1).append(this.pending);
    }
    return start;
  }
}

async function request(path, body) {
  const headers = {"Content-Type": "application/json"};
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const response = await fetch(path, {
    method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal: writing?.signal,
  }).catch(error => { throw error.name === "AbortError" ? error : new Error("The server cannot be reached."); });
  $("key-row").hidden = response.status !== 401;
  if (response.ok) return response;
  if (response.status === 401) {
    $("key").focus();
    throw new Error($("key").value ? "This is not the server’s key." : "This server needs its key.");
  }
  const answer = await response.text();
  let message = answer || `The server answered with status ${response.status}.`;
  try { message = JSON.parse(answer).error.message; } catch { /* a proxy's answer, which is no JSON */ }
  throw new Error(message);
}

async function loadModel() {
  model ??= (await (await request("v1/models")).json()).data[0].id;
  $("model").textContent = $("model").title = $("asked").textContent = model;
}

/** The objects of a stream of server-sent events, up to [DONE]. */
async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", part; !(part = await reader.read()).done;) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter(line => line.startsWith("data:"))) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
  throw new Error("The server went away before the answer ended.");
}

/** The tab's storage keeps the chat and the settings over a reload. */
function save() {
  try {
    sessionStorage.setItem("chat", JSON.stringify(turns));
    for (const id of SETTINGS) sessionStorage.setItem(id, $(id).value);
  } catch {
    $("error").textContent = "The browser does not store this chat: a reload loses it.";
  }
}

function restore() {
  try {
    turns = JSON.parse(sessionStorage.getItem("chat")) ?? [];
    for (const id of SETTINGS) $(id).value = sessionStorage.getItem(id) ?? "";
  } catch { /* the browser forbids storage; `save` tells */ }
  turns = turns.filter(turn => turn.text || turn.thinking || turn.ending);
  for (const turn of turns) {
    const {section, answer} = addTurn(turn);
    if (turn.thinking) answer.think(turn.thinking, turn.thinkingKinds);
    answer.write(turn.text, turn.kinds);
    answer.end();
    addFigures(section, turn);
  }
}

function addTurn({question}) {
  const section = add($("log"), "section", "turn");
  add(section, "p", "question", question);
  const element = add(section, "div", "answer");
  return {section, element, answer: new Answer(element)};
}

function addFigures(section, {drafts, ending, usage, metrics}) {
  const speculative = metrics?.speculative_decoding;
  const figures = [
    [metrics?.tokens_per_second?.toFixed(1), drafts ? "tokens/s" : "tokens/s without drafts"],
    [speculative?.drafted && `${Math.round(100 * speculative.accepted / speculative.drafted)} %`,
      `of ${speculative?.drafted} drafted tokens accepted`],
    [usage?.completion_tokens_details?.reasoning_tokens, `of ${usage?.completion_tokens} tokens thinking`],
    [metrics && `${metrics.time_to_first_token.toFixed(2)} s`, "to the first token"],
    [usage && `${usage.prompt_tokens_details?.cached_tokens ?? 0}`,
      `of ${usage?.prompt_tokens} prompt tokens cached`],
    [ending === "length" && "cut off", "at the limit of tokens"],
    [!ending && "stopped", "before its end"],
  ];
  const line = add(section, "p", "figures");
  for (const [value, name] of figures.filter(([value]) => value)) {
    const figure = add(line, "span", "");
    add(figure, "b", "", value);
    figure.append(` ${name}`);
  }
}

async function ask(question) {
  // The model's template decides whether the model sees earlier thinking.
  const messages = turns.flatMap(({question, thinking, text}) => [
    {role: "user", content: question}, {role: "assistant", content: text, reasoning_content: thinking || undefined},
  ]);
  const system = $("system").value.trim();
  if (system) messages.unshift({role: "system", content: system});
  const turn = {question, drafts: $("drafts").checked, thinking: "", thinkingKinds: "", text: "", kinds: ""};
  const {section, element, answer} = addTurn(turn);
  element.ariaBusy = true;
  turns.push(turn);
  try {
    const response = await request("v1/chat/completions", {
      model, messages: [...messages, {role: "user", content: question}], drafts: turn.drafts,
      temperature: $("temperature").valueAsNumber, max_tokens: $("limit").valueAsNumber,  // not a number: null
      stream: true, stream_drafts: true, stream_options: {include_usage: true},
    });
    for await (const chunk of chunks(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      turn.usage = chunk.usage ?? turn.usage;
      turn.metrics = chunk.metrics ?? turn.metrics;
      for (const {delta, draft, finish_reason} of chunk.choices) {
        turn.ending = finish_reason ?? turn.ending;
        const thought = delta.reasoning_content;
        const text = thought ?? delta.content ?? "";
        const accepted = [...text].slice(0, draft?.accepted ?? 0).join("").length;  // the server counts code points
        const kinds = "a".repeat(accepted) + "o".repeat(text.length - accepted);
        if (thought) {
          turn.thinking += text;
          turn.thinkingKinds += kinds;
          answer.think(text, kinds);
        } else if (text) {
          turn.text += text;
          turn.kinds += kinds;
          answer.write(text, kinds);
        }
        if (draft) answer.pending.textContent = draft.pending;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") $("error").textContent = error.message;
  }
  answer.end();
  element.ariaBusy = null;
  addFigures(section, turn);
  if (!section.isConnected) return;  // a new chat has begun
  if (!turn.ending && !turn.text && !turn.thinking) {  // no answer: offer the question again
    section.remove();
    turns.pop();
    $("question").value ||= question;
  }
  save();
}

/** Copy the text of an element without colours. navigator.clipboard does not exist without HTTPS. */
function copy(element) {
  document.addEventListener("copy", event => {
    event.clipboardData.setData("text/plain", element.textContent);
    event.preventDefault();
  }, {once: true});
  getSelection().selectAllChildren(element);
  const isCopied = document.execCommand("copy");
  getSelection().removeAllRanges();
  return isCopied;
}

$("form").onsubmit = async event => {
  event.preventDefault();
  if (writing) return;
  writing = new AbortController();
  $("error").textContent = "";
  $("send").hidden = !($("stop").hidden = false);
  try {
    await loadModel();
    const question = $("question").value.trim();
    if (question) {
      $("question").value = "";
      await ask(question);
    }
  } catch (error) {
    $("error").textContent = error.message;
  }
  writing = null;
  $("send").hidden = !($("stop").hidden = true);
  if (document.activeElement !== $("key")) $("question").focus();
};
$("question").onkeydown = event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
};
$("stop").onclick = () => writing?.abort();
$("set").onclick = () => {
  $("set").ariaExpanded = !($("settings").hidden = !$("settings").hidden);
};
$("anew").onclick = () => {
  writing?.abort();
  turns = [];
  $("log").replaceChildren();
  $("error").textContent = "";
  save();
  $("question").focus();
};
document.onclick = ({target}) => {
  if (target.matches(".examples button")) {
    $("question").value = target.textContent;
    $("form").requestSubmit();
  } else if (target.matches(".copy")) {
    target.textContent = copy(target.closest(".code").querySelector("code")) ? "Copied" : "Not copied";
    setTimeout(() => { target.textContent = "Copy"; }, 1500);
  }
};
addEventListener("pagehide", save);
restore();
loadModel().catch(error => { $("error").textContent = error.message; });
