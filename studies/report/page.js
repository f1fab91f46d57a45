"use strict";
// Texts of the run are only ever set as text, never as markup.

const PAGE = 100;
const byId = (id) => document.getElementById(id);

function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Control characters and those that reorder or hide text are shown by their number.
function visible(text) {
  return text.replace(
    /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
    (character) => "\\u" + character.charCodeAt(0).toString(16).padStart(4, "0"));
}

function figure(value, digits = 3) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

const percent = (value) => value === null ? "–" : (100 * value).toFixed(1) + " %";
const sum = (values) => values.some((v) => v === null) ? null : values.reduce((a, b) => a + b, 0);

function option(value, label) {
  return make("option", {value: value, textContent: label});
}

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

/* The tree of one instance */

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function bars(sampled, wanted) {
  const drawing = svg("svg", {class: "bars", width: 190, height: 16, "aria-hidden": "true"});
  [[sampled, "sampled", 1], [wanted, "wanted", 8]].forEach(([share, kind, y]) => {
    if (share > 0) drawing.append(svg("rect", {class: kind, x: 0, y: y, width: Math.max(share * 190, 0.5), height: 6}));
  });
  return make("td", {}, drawing);
}

function number(text) {
  return make("td", {className: "number", textContent: text});
}

function heads(names) {
  const cells = names.map(([name, kind]) => {
    const key = kind === "sampled" || kind === "wanted" ? make("span", {className: "key " + kind}) : null;
    return make("th", {scope: "col", className: kind === "" ? "" : "number"}, ...[key, name].filter((x) => x !== null));
  });
  return make("thead", {}, make("tr", {}, ...cells));
}

function showTree(tree) {
  const makers = tree.versions.length === 0 ? "" : ", by adapter version " + tree.versions.join(", ");
  const distance = tree.total_variation === null ? "The target R^β / Z of this instance is not known."
    : "Total variation between sampled outcomes and target: " + figure(tree.total_variation) + ".";
  byId("tree-said").textContent = tree.sampled + " trajectories of the policy" + makers + ". " + distance;
  byId("outcomes").replaceChildren(
    heads([["outcome", ""], ["sampled", "sampled"], ["target", "wanted"], ["", ""]]),
    make("tbody", {}, ...tree.outcomes.map((outcome) => make("tr", {},
      make("td", {textContent: visible(outcome.name), title: visible(outcome.name)}), number(percent(outcome.share)), number(percent(outcome.target)),
      bars(outcome.share, outcome.target)))));
  byId("tree-rows").replaceChildren(
    heads([["actions", ""], ["trajectories", "n"], ["sampled", "sampled"], ["target", "wanted"], ["", ""], ["P(a)", "n"],
      ["P*(a)", "n"], ["ends with", ""]]),
    make("tbody", {}, ...tree.rows.map(treeRow)));
}

function treeRow(row) {
  const guide = row.depth === 0 ? "" : "│ ".repeat(row.depth - 1) + "├ ";
  const unseen = row.count === 0 && row.expert === 0;
  const counted = row.count + (row.expert > 0 ? " + " + row.expert + " expert" : "");
  const ends = make("td", row.ends === null ? {} : {title: visible(row.ends.outcome)});
  if (row.ends !== null) {
    ends.append(
      make("span", {className: row.ends.success ? "good" : "bad", textContent: row.ends.success ? "✓ " : "✗ "}),
      [...new Set([visible(row.ends.outcome), row.ends.end.replace("_", " ")])].join(", ") + ", log R " + figure(row.ends.log_reward, 2));
  }
  return make("tr", {className: unseen ? "unseen" : ""},
    make("td", {title: visible(row.action)}, make("span", {className: "guide", textContent: guide}), visible(row.action)),
    number(counted), number(percent(row.share)), number(percent(row.target)), bars(row.share, row.target),
    number(figure(row.policy)), number(figure(row.target_policy)), ends);
}

function startTree(data, showInstance) {
  const chooser = byId("instance");
  byId(data.trees.length === 0 ? "tree-none" : "tree-part").hidden = false;
  if (data.trees.length === 0) return;
  const trees = new Map(data.trees.map((tree) => [tree.instance, tree]));
  for (const tree of data.trees) chooser.append(option(tree.instance, visible(tree.instance) + " (" + tree.rows[0].count + ")"));
  chooser.value = data.instance;
  chooser.addEventListener("change", () => showTree(trees.get(chooser.value)));
  byId("instance-only").addEventListener("click", () => showInstance(chooser.value));
  showTree(trees.get(data.instance));
}

/* One trajectory */

function tokens(step, pieces) {
  const shown = step.ids.map((id, at) => {
    const logProb = step.log_probs[at];
    const level = logProb === null ? 0 : [0.05, 0.5, 1.5, 3].filter((border) => -logProb > border).length;
    const text = pieces.has(id) ? visible(pieces.get(id)).replace(/\n/g, "⏎").replace(/\t/g, "⇥") : "#" + id;
    const acts = at >= step.cot_end && at < step.action_end;
    return make("span", {className: "token p" + level + (acts ? " act" : "")},
      make("b", {textContent: text.trim() === "" ? "␣" : text}), make("small", {textContent: figure(logProb, 2)}));
  });
  return make("div", {className: "tokens"}, ...shown);
}

// A prompt is the beginning of the one before, as long as its first value says, and its second value.
function promptsOf(trajectory) {
  const prompts = [];
  for (const {prompt: [kept, rest]} of trajectory.steps) {
    prompts.push(kept > 0 ? prompts[prompts.length - 1].slice(0, kept) + rest : rest);
  }
  return prompts;
}

function stepCard(step, at, prompt, trajectory, context) {
  const cot = sum(step.log_probs.slice(0, step.cot_end));
  const act = sum(step.log_probs.slice(step.cot_end, step.action_end));
  const both = cot === null || act === null || step.action === null ? null : act + context.cotWeight * cot;
  const maker = step.version < 0 ? "the expert" : "version " + step.version;
  const picture = step.picture === null ? make("p", {className: "note", textContent: "picture left out"})
    : make("img", {src: context.pictures[step.picture], alt: "what the policy saw at step " + at});
  const valid = step.validity === "valid";
  const sums = [["log P(thoughts)", figure(cot)], ["log P(action)", figure(act)], ["log P_F", figure(both)],
    ["log R before", figure(trajectory.log_rewards[at])], ["reward", figure(trajectory.rewards[at], 2)]];
  return make("div", {className: "step"}, make("div", {}, picture), make("div", {},
    make("h4", {textContent: "Step " + at + ", " + maker}),
    make("details", {open: at === 0}, make("summary", {textContent: "Prompt"}),
      make("pre", {className: "text", textContent: visible(prompt)})),
    make("h5", {textContent: "Chain of thought"}),
    make("pre", {className: "text", textContent: visible(step.thoughts)}),
    make("h5", {textContent: "Whole response"}),
    make("pre", {className: "text", textContent: visible(step.response)}),
    make("h5", {textContent: "Action"}),
    make("p", {className: "text"}, make("span", {className: "action", textContent: step.action === null ? "none" : visible(step.action)}),
      make("span", {className: valid ? "good" : "bad", textContent: "  " + step.validity})),
    make("h5", {textContent: "Tokens and their log-probabilities, the action underlined"}), tokens(step, context.pieces),
    make("p", {className: "sums"}, ...sums.map(([name, value]) => make("span", {}, name + " ", make("b", {textContent: value}))))));
}

function showTrajectory(trajectory, context) {
  const prompts = promptsOf(trajectory);
  const last = trajectory.log_rewards[trajectory.log_rewards.length - 1];
  const result = make("span", {className: trajectory.success ? "good" : "bad", textContent: trajectory.success ? "solved" : "not solved"});
  byId("detail").replaceChildren(
    make("h3", {textContent: visible(trajectory.id)}),
    make("p", {}, visible(trajectory.instance) + ", " + (trajectory.expert ? "made by the expert" : "made by the policy") + ", ", result,
      ": ended by " + trajectory.end.replace("_", " ") + " with outcome " + visible(trajectory.outcome) + ", log R " + figure(last)),
    ...trajectory.steps.map((step, at) => stepCard(step, at, prompts[at], trajectory, context)));
}

/* The list and its filters */

const versionsOf = (trajectory) => [...new Set(trajectory.steps.map((step) => step.version))];

function searchable(trajectory) {
  const texts = trajectory.steps.flatMap((step) => [step.prompt[1], step.response]);
  return [trajectory.id, trajectory.instance, trajectory.outcome, ...texts].join("\n").toLowerCase();
}

const ORDERS = {
  "newest first": (a, b) => b.place - a.place,
  "oldest first": (a, b) => a.place - b.place,
  "highest reward first": (a, b) => b.worth - a.worth || b.place - a.place,
  "lowest reward first": (a, b) => a.worth - b.worth || b.place - a.place,
  "longest first": (a, b) => b.steps.length - a.steps.length || b.place - a.place,
};

const FILTERS = {
  task: {of: (t) => [t.task]},
  split: {of: (t) => [t.split]},
  success: {of: (t) => [t.success ? "solved" : "not solved"]},
  maker: {of: (t) => [t.expert ? "expert" : "policy"]},
  version: {of: (t) => versionsOf(t).filter((version) => version >= 0).map(String), numeric: true},
  end: {of: (t) => [t.end.replace("_", " ")]},
  instance: {of: (t) => [t.instance]},
};

function fillFilters(trajectories) {
  for (const [name, filter] of Object.entries(FILTERS)) {
    const values = [...new Set(trajectories.flatMap(filter.of))];
    values.sort(filter.numeric ? (a, b) => a - b : undefined);
    const chooser = byId("filter-" + name);
    chooser.append(option("", "all"), ...values.map((value) => option("=" + value, visible(value))));
  }
  byId("order").append(...Object.keys(ORDERS).map((name) => option(name, name)));
}

function startBrowser(data, pictures) {
  const context = {pictures: pictures, pieces: new Map(data.pieces), cotWeight: data.cot_weight};
  const all = data.trajectories;
  all.forEach((trajectory, place) => {
    trajectory.place = place;
    trajectory.worth = trajectory.log_rewards[trajectory.log_rewards.length - 1];
    trajectory.text = searchable(trajectory);
  });
  const list = byId("list");
  let matching = [];

  function choose(button, trajectory) {
    for (const other of list.querySelectorAll('[aria-current="true"]')) other.removeAttribute("aria-current");
    button.setAttribute("aria-current", "true");
    showTrajectory(trajectory, context);
  }

  function row(trajectory) {
    const versions = trajectory.expert ? "expert" : "v" + versionsOf(trajectory).join(", ");
    const button = make("button", {type: "button"},
      make("span", {className: "top"},
        make("span", {className: trajectory.success ? "good" : "bad", textContent: trajectory.success ? "✓ solved" : "✗ " + trajectory.end.replace("_", " ")}),
        make("span", {textContent: trajectory.split + ", " + versions}),
        make("span", {textContent: "log R " + figure(trajectory.worth, 2)})),
      make("span", {className: "moves", textContent: visible(trajectory.steps.map((step) => step.action === null ? "(malformed)" : step.action).join(" · "))}));
    button.addEventListener("click", () => choose(button, trajectory));
    return make("li", {}, button);
  }

  function addRows() {
    const start = list.children.length;
    list.append(...matching.slice(start, start + PAGE).map(row));
    byId("more").hidden = list.children.length >= matching.length;
  }

  function apply() {
    const wanted = Object.keys(FILTERS).map((name) => [FILTERS[name].of, byId("filter-" + name).value]).filter(([, value]) => value !== "");
    const text = byId("filter-text").value.toLowerCase();
    matching = all.filter((trajectory) =>
      wanted.every(([of, value]) => of(trajectory).includes(value.slice(1))) && trajectory.text.includes(text));
    matching.sort(ORDERS[byId("order").value]);
    byId("count").textContent = matching.length + " of " + all.length + " shown trajectories match";
    list.replaceChildren();
    addRows();
    list.scrollTop = 0;
    if (matching.length > 0) choose(list.querySelector("button"), matching[0]);
    else byId("detail").replaceChildren(make("p", {textContent: "No trajectory matches; reset the filters to see all."}));
  }

  fillFilters(all);
  byId("filters").addEventListener("input", apply);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () => setTimeout(apply));
  byId("more").addEventListener("click", addRows);
  list.addEventListener("keydown", (event) => {
    const way = {ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling"}[event.key];
    const item = event.target.closest("li");
    if (way === undefined || item === null) return;
    event.preventDefault();
    if (event.key === "ArrowDown" && item[way] === null) addRows();
    if (item[way] !== null) {
      const button = item[way].querySelector("button");
      button.focus();
      button.click();
    }
  });
  apply();
  return (instance) => {
    byId("filters").reset();
    setTimeout(() => {
      byId("filter-instance").value = "=" + instance;
      apply();
      byId("browser").scrollIntoView();
    });
  };
}

async function start() {
  const data = await unpacked("data");
  const pictures = JSON.parse(byId("pictures").textContent);
  startTree(data, startBrowser(data, pictures));
  document.documentElement.dataset.readyMs = Math.round(performance.now());
}

start().catch((error) => {
  byId("count").textContent = "The trajectories cannot be shown: " + error;
});
