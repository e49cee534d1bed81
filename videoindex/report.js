"use strict";
// The page of `search.py --report`: filter, sort, play two videos side by side, choose, save.

const data = JSON.parse(document.getElementById("data").textContent); // {index, files: [path]}
const byId = (id) => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const sections = all("main > section");
const pairs = all(".pair");
const place = new Map([...sections, ...pairs].map((item, i) => [item, i])); // the answer's order
let current = null; // the pair that the keys act on

document.documentElement.classList.add("js");

// --- choices: of a file "keep" or "drop", of a pair "not a match" -------------------------------

// Stored by index, so that all its pages share them: {keep: [path], drop: [path], not_a_match: [[path, path]]}.
const storageKey = `choices of ${data.index}`;
const files = new Map(); // {path: "keep" or "drop"}
const dismissed = new Map(); // {key of a pair: [path, path]}

const pairPaths = (pair) => [data.files[pair.dataset.a], data.files[pair.dataset.b]];
const pairKey = (paths) => JSON.stringify([...paths].sort());

function load() {
  let stored = {};
  try {
    stored = JSON.parse(localStorage.getItem(storageKey)) || {};
  } catch { /* private window, or not ours */ }
  for (const choice of ["keep", "drop"]) {
    for (const path of stored[choice] || []) files.set(path, choice);
  }
  for (const paths of stored.not_a_match || []) dismissed.set(pairKey(paths), paths);
}

function chosen(only = () => true) {
  const paths = (choice) => [...files.keys()].filter((path) => files.get(path) === choice && only(path));
  const notAMatch = [...dismissed.values()].filter((both) => both.every(only));
  return { keep: paths("keep"), drop: paths("drop"), not_a_match: notAMatch };
}

// What this page shows: only that is saved as a file, or cleared.
const shownFiles = new Set(all("[data-file]").map((box) => data.files[box.dataset.file]));
pairs.forEach((pair) => pairPaths(pair).forEach((path) => shownFiles.add(path)));
const onThisPage = (path) => shownFiles.has(path);

function store() {
  try {
    localStorage.setItem(storageKey, JSON.stringify(chosen()));
  } catch { /* they last as long as the page */ }
  show();
}

function show() {
  for (const box of all("[data-file]")) {
    box.checked = files.get(data.files[box.dataset.file]) === box.dataset.choice;
  }
  for (const pair of pairs) {
    const paths = pairPaths(pair);
    const isDismissed = dismissed.has(pairKey(paths));
    pair.classList.toggle("dismissed", isDismissed);
    const box = pair.querySelector("[data-not-a-match]");
    if (box) box.checked = isDismissed;
    const bothDropped = paths.every((path) => files.get(path) === "drop");
    pair.querySelector(".warning").hidden = !bothDropped;
  }
  for (const members of all(".members")) {
    const boxes = all("[data-choice=drop]", members);
    const allDropped = boxes.length > 0 && boxes.every((box) => box.checked);
    members.parentNode.querySelector("h2 .warning").hidden = !allDropped;
  }
  const { keep, drop, not_a_match: no } = chosen(onThisPage);
  const count = keep.length + drop.length + no.length;
  byId("clear").hidden = !count;
  byId("save").textContent = count ? `Save ${count} choice${count > 1 ? "s" : ""}` : "Save choices";
  byId("save").title = `choices.json, for search.py choices: ${keep.length} to keep, ${drop.length} to drop, ${no.length} not a match`;
  measureTools();
}

function choose(path, choice) {
  if (files.get(path) === choice) files.delete(path);
  else files.set(path, choice);
  store();
}

function dismiss(pair) {
  const paths = pairPaths(pair);
  const key = pairKey(paths);
  if (!dismissed.delete(key)) dismissed.set(key, paths);
  store();
}

function save() {
  const text = JSON.stringify(chosen(onThisPage), null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "choices.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function clear() {
  for (const path of shownFiles) files.delete(path);
  for (const [key, paths] of dismissed) if (paths.every(onThisPage)) dismissed.delete(key);
  store();
}

// --- filter and sort ----------------------------------------------------------------------------

function filter() {
  const name = byId("name").value.toLowerCase();
  const verdict = byId("verdict").value;
  const score = parseFloat(byId("score").value);
  let shown = 0;
  for (const pair of pairs) {
    const { names, verdict: own, score: ownScore } = pair.dataset;
    pair.hidden = !names.toLowerCase().includes(name) || (verdict && own !== verdict) || ownScore < score;
    shown += !pair.hidden;
  }
  for (const section of sections) {
    const own = all(".pair", section);
    const named = section.dataset.names.toLowerCase().includes(name);
    section.hidden = own.length ? own.every((pair) => pair.hidden) : !named || Boolean(verdict);
  }
  const [counts] = all(".counts");
  const total = `${pairs.length} ${counts.dataset.noun}`;
  counts.textContent = shown === pairs.length ? total : `${shown} of ${total}`;
}

function sortKey(item, by) {
  if (by === "name") return item.dataset.name.toLowerCase();
  if (!by) return place.get(item);
  if (by in item.dataset) return -item.dataset[by];
  return Math.min(0, ...all(".pair", item).map((pair) => -pair.dataset[by])); // a section's best
}

function sort() {
  const by = byId("sort").value;
  const compare = ([a], [b]) => (a < b ? -1 : a > b ? 1 : 0);
  for (const items of [sections, ...sections.map((section) => all(".pair", section))]) {
    const keyed = items.map((item) => [sortKey(item, by), item]).sort(compare);
    if (items.length) items[0].parentNode.append(...keyed.map(([, item]) => item));
  }
}

// --- play ---------------------------------------------------------------------------------------

const PICTURE = /\.(gif|a?png|jpe?g|webp|avif|bmp)$/i;

// One pair has players at a time: a browser allows only so many.
function stageOf(pair) {
  const stage = pair.querySelector(".stage");
  if (!stage.hidden) return stage;
  for (const other of all(".stage:not([hidden])")) {
    other.hidden = true;
    all("video", other).forEach((video) => { video.removeAttribute("src"); video.load(); });
    other.replaceChildren();
  }
  const links = all("thead a", pair);
  all(".strip", pair).forEach((strip, i) => {
    const line = document.createElement("p");
    if ("gone" in links[i].dataset) {
      line.append(links[i].title, " is gone.");
      stage.append(line);
      return;
    }
    const player = document.createElement(PICTURE.test(links[i].href) ? "img" : "video");
    if (player.matches("video")) {
      Object.assign(player, { preload: "none", controls: true, muted: true, playsInline: true });
      player.poster = strip.querySelector("img").src;
    }
    player.setAttribute("aria-label", links[i].title);
    player.addEventListener("error", () => {
      line.append("This browser cannot play ", links[i].cloneNode(true), ". Open it in a player.");
      player.replaceWith(line);
    });
    player.src = links[i].href;
    stage.append(player);
  });
  stage.hidden = false;
  return stage;
}

function seek(video, seconds) {
  return new Promise((resolve) => {
    for (const event of ["seeked", "canplay", "error"]) video.addEventListener(event, resolve, { once: true });
    video.preload = "auto";
    video.currentTime = seconds;
  });
}

// `at`: the second of each video; without, from where they are, or pause.
async function play(pair, at) {
  setCurrent(pair);
  const isNew = pair.querySelector(".stage").hidden;
  const stage = stageOf(pair);
  const videos = all("video", stage);
  if (!at && videos.some((video) => !video.paused)) {
    videos.forEach((video) => video.pause());
    return;
  }
  if (isNew && !at) {
    const first = pair.querySelector(".from");
    at = first ? first.dataset.at : "0 0";
  }
  if (at) {
    const seconds = at.split(" ").map(Number);
    videos.forEach((video) => video.pause());
    const sides = [...stage.children]; // a picture or a line may stand in for a video
    await Promise.all(videos.map((video) => seek(video, seconds[sides.indexOf(video)])));
  }
  for (const video of all("video", stage)) video.play().catch(() => {});
}

// --- keyboard and mouse -------------------------------------------------------------------------

// What is scrolled to must not lie behind the tools.
function measureTools() {
  document.documentElement.style.scrollPaddingTop = `${all(".tools")[0].offsetHeight + 6}px`;
}

function showFilters(open) {
  byId("filters").classList.toggle("open", open);
  byId("more").setAttribute("aria-expanded", open);
  measureTools();
}

function setCurrent(pair) {
  if (current) current.classList.remove("current");
  current = pair;
  pair.classList.add("current");
}

function move(step) {
  const shown = all(".pair").filter((pair) => !pair.hidden);
  if (!shown.length) return;
  const at = shown.indexOf(current);
  const next = at < 0 ? (step > 0 ? 0 : shown.length - 1) : at + step;
  const pair = shown[Math.min(Math.max(next, 0), shown.length - 1)];
  const details = pair.closest("details");
  if (details) details.open = true;
  setCurrent(pair);
  pair.focus({ preventScroll: true });
  pair.scrollIntoView({ block: "start" });
  // Cards above are measured only once they have been near the window.
  requestAnimationFrame(() => pair.scrollIntoView({ block: "start" }));
}

function tick(choice, side) {
  const box = current && all(`.facts [data-choice="${choice}"]`, current)
    .find((item) => item.dataset.file === current.dataset[side]);
  if (box) box.click();
}

const KEYS = {
  ArrowRight: () => move(1),
  ArrowLeft: () => move(-1),
  " ": () => current && play(current),
  k: (event) => tick("keep", event.shiftKey ? "a" : "b"),
  d: (event) => tick("drop", event.shiftKey ? "a" : "b"),
  n: () => current && current.querySelector("[data-not-a-match]") && dismiss(current),
  s: save,
  "/": () => { showFilters(true); byId("name").focus(); },
};

document.addEventListener("keydown", (event) => {
  const at = event.target;
  if (at.matches("input[type=search], input[type=number], select, video")) {
    if (event.key === "Escape") at.blur();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " " && at.matches("button, summary, input, a")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === " " && !current) return; // scrolls, as everywhere
  if (key in KEYS) {
    event.preventDefault();
    KEYS[key](event);
  }
});

document.addEventListener("change", (event) => {
  const box = event.target;
  if (box.dataset.file) choose(data.files[box.dataset.file], box.dataset.choice);
  else if ("notAMatch" in box.dataset) dismiss(box.closest(".pair"));
  else if (box.id === "sort") sort();
});

document.addEventListener("click", (event) => {
  const pair = event.target.closest(".pair");
  if (pair) setCurrent(pair);
  const button = event.target.closest("button");
  if (!button) return;
  if (button.matches(".play")) play(pair);
  else if (button.matches(".from")) play(pair, button.dataset.at);
  else if (button.id === "save") save();
  else if (button.id === "clear") clear();
  else if (button.id === "more") showFilters(!byId("filters").matches(".open"));
});

byId("name").addEventListener("input", filter);
byId("verdict").addEventListener("input", filter);
byId("score").addEventListener("input", filter);
addEventListener("storage", (event) => {
  if (event.key !== storageKey) return;
  files.clear();
  dismissed.clear();
  load();
  show();
});

addEventListener("resize", measureTools);

load();
show();
filter();
measureTools();
