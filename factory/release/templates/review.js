"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const study = JSON.parse($("study").textContent);
  const MAX_FILE = 5e6; // bytes; a full review has far fewer
  const RATER = /^[A-Za-z0-9._-]{1,40}$/;
  const captions = study.items.flatMap((item) => item.captions.map(([letter]) => `${item.id}/${letter}`));
  const tags = new Set(study.defects.map((defect) => defect.tag));
  let rater = "", at = 0, active = 0, kept = true, unsaved = false, ratings = new Map();

  const element = (name, attributes = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const say = (text) => { $("say").textContent = text; };
  const fail = (text) => {
    const where = $("work").hidden ? $("problem") : $("failure");
    where.textContent = text;
    where.hidden = !text && where.id === "failure";
  };
  const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

  // ---------------------------------------------------------------------------------------------- the ratings

  const empty = () => ({ plausibility: null, defects: [], remark: "" });
  const isEmpty = (rating) => rating.plausibility === null && !rating.defects.length && !rating.remark;
  const id = (index = active) => `${study.items[at].id}/${study.items[at].captions[index][0]}`;
  const rating = (key) => ratings.get(key) ?? empty();
  const numRated = () => captions.filter((key) => rating(key).plausibility !== null).length;
  const change = (key, changes) => {
    const changed = { ...rating(key), ...changes };
    if (isEmpty(changed)) ratings.delete(key); else ratings.set(key, changed);
    unsaved = true;
    keep();
    refresh();
  };
  const rows = () => captions.filter((key) => ratings.has(key)).map((key) => {
    const cut = key.lastIndexOf("/");
    return { item: key.slice(0, cut), caption: key.slice(cut + 1), ...ratings.get(key) };
  });

  // A browser may refuse storage to a page from a file; then the file that the rater saves is the only copy.
  const slot = () => `${study.format}:${study.study}:${rater}`;
  const keep = () => {
    try { localStorage.setItem(slot(), JSON.stringify(rows())); kept = true; } catch { kept = false; }
  };
  const recall = () => {
    try {
      const text = localStorage.getItem(slot());
      return text === null ? [] : checked(JSON.parse(text));
    } catch { return []; }
  };

  // The rows of a file, or an Error in one sentence that names the field.
  const checked = (found) => {
    if (!Array.isArray(found)) throw new Error("ratings must be a list; choose a file that this page saved.");
    for (const [i, row] of found.entries()) {
      const bad = (field, rule) => new Error(`ratings[${i}].${field} must be ${rule}; choose a file that this page saved.`);
      if (row === null || typeof row !== "object") throw new Error(`ratings[${i}] must be a rating; choose a file that this page saved.`);
      if (!captions.includes(`${row.item}/${row.caption}`)) throw bad("item", "an image and caption of this page");
      if (row.plausibility !== null && ![1, 2, 3, 4, 5].includes(row.plausibility)) throw bad("plausibility", "1 to 5 or null");
      if (!Array.isArray(row.defects) || !row.defects.every((tag) => tags.has(tag))) throw bad("defects", "known tags");
      if (typeof row.remark !== "string" || row.remark.length > study.maxRemark) throw bad("remark", `at most ${study.maxRemark} characters`);
    }
    return found;
  };
  const take = (found) => {
    for (const { item, caption, plausibility, defects, remark } of found) ratings.set(`${item}/${caption}`, { plausibility, defects, remark });
  };

  // -------------------------------------------------------------------------------------------------- the view

  const card = ([letter, text], index) => {
    const scale = element("div", { class: "scale" }, ...study.plausibility.map((word, i) => element("label", {},
      element("input", { type: "radio", name: `plausibility-${letter}`, value: i + 1, "aria-label": `${i + 1}, ${word}` }),
      element("span", { "aria-hidden": "true" }, element("b", {}, String(i + 1)), word))));
    const chips = element("div", { class: "chips", role: "group", "aria-label": `Defects of caption ${letter}` }, ...study.defects.map((defect) =>
      element("button", { type: "button", "data-tag": defect.tag, "aria-pressed": "false", "aria-keyshortcuts": defect.key }, element("kbd", { "aria-hidden": "true" }, defect.key), ` ${defect.name}`)));
    const remark = element("input", { type: "text", maxlength: study.maxRemark, "aria-label": `Remark on caption ${letter}`, placeholder: "optional" });
    const made = element("section", { class: "card", role: "group", tabindex: "-1", "data-index": index, "aria-labelledby": `name-${letter}`, "aria-describedby": `text-${letter}` },
      element("h2", { id: `name-${letter}` }, "Caption ", element("b", {}, letter)),
      element("p", { class: "text", id: `text-${letter}` }, text),
      element("fieldset", {}, element("legend", {}, "Plausible as a description of this image?"), scale),
      element("fieldset", {}, element("legend", {}, "Defects, as many as apply"), chips),
      element("label", { class: "remark" }, element("span", {}, "Remark ", element("kbd", { "aria-hidden": "true" }, "r")), remark));
    made.addEventListener("focusin", () => activate(index, false));
    made.addEventListener("click", (event) => {
      const chip = event.target.closest("[data-tag]");
      if (chip) toggle(chip.dataset.tag, index);
      activate(index, event.detail > 0 && !event.target.closest("input[type=text]")); // after the mouse, keys are the page's again
    });
    scale.addEventListener("change", (event) => rate(Number(event.target.value), index));
    remark.addEventListener("input", () => change(id(index), { remark: remark.value.slice(0, study.maxRemark) }));
    return made;
  };

  const show = (to, first = 0) => {
    at = Math.max(0, Math.min(to, study.items.length));
    fail("");
    const over = at === study.items.length;
    $("item").hidden = over;
    $("end").hidden = !over;
    window.scrollTo(0, 0);
    if (over) {
      $("captions").replaceChildren();
      refresh();
      $("end").focus();
      return say(`${$("end-title").textContent} ${$("end-text").textContent}`);
    }
    const item = study.items[at];
    $("image").src = `data:image/png;base64,${item.image}`;
    $("image").alt = `Image ${at + 1}, which the captions describe`;
    $("captions").replaceChildren(...item.captions.map(card));
    active = Math.min(first, item.captions.length - 1);
    refresh();
    activate(active, true);
    say(`Image ${at + 1} of ${study.items.length}, ${plural(item.captions.length, "caption")}`);
  };

  const refresh = () => {
    const done = numRated(), left = captions.length - done;
    $("where").textContent = at < study.items.length ? `Image ${at + 1} of ${study.items.length}` : "The end";
    $("done").textContent = `${done} of ${plural(captions.length, "caption")} rated`;
    $("progress").max = captions.length;
    $("progress").value = done;
    $("saved").textContent = !unsaved ? "" : kept ? "Kept in this browser" : "Not kept: save the file";
    $("notice").hidden = kept;
    $("notice").textContent = kept ? "" : "This browser keeps nothing for this page. Save the file before you close it; you can load it here again.";
    $("end-title").textContent = left ? `${plural(left, "caption")} ${left === 1 ? "is" : "are"} not rated yet.` : "All captions are rated.";
    $("end-text").textContent = `Save the file and hand it back${left ? "; it can also be saved as it is, and loaded here again to go on" : ""}.`;
    for (const box of $("captions").children) {
      const index = Number(box.dataset.index), now = rating(id(index));
      box.classList.toggle("active", index === active);
      for (const radio of box.querySelectorAll("input[type=radio]")) radio.checked = Number(radio.value) === now.plausibility;
      for (const chip of box.querySelectorAll("[data-tag]")) chip.setAttribute("aria-pressed", now.defects.includes(chip.dataset.tag));
      const remark = box.querySelector("input[type=text]");
      if (remark.value !== now.remark) remark.value = now.remark;
    }
  };

  const activate = (index, focus) => {
    active = index;
    for (const box of $("captions").children) box.classList.toggle("active", Number(box.dataset.index) === index);
    const box = $("captions").children[index];
    if (!focus || !box) return;
    box.focus({ preventScroll: true });
    box.scrollIntoView({ block: "nearest" });
  };

  // ----------------------------------------------------------------------------------------------- what keys do

  const rate = (value, index = active) => {
    change(id(index), { plausibility: value });
    say(`Caption ${study.items[at].captions[index][0]}: ${value === null ? "no plausibility" : `${value}, ${study.plausibility[value - 1]}`}`);
  };
  const toggle = (tag, index = active) => {
    const had = rating(id(index)).defects;
    const has = study.defects.map((defect) => defect.tag).filter((known) => had.includes(known) !== (known === tag));
    change(id(index), { defects: has });
    say(`${study.defects.find((defect) => defect.tag === tag).name}: ${has.includes(tag) ? "set" : "not set"}`);
  };
  const down = () => (active + 1 < study.items[at].captions.length ? activate(active + 1, true) : show(at + 1));
  const up = () => (active > 0 ? activate(active - 1, true) : at > 0 && show(at - 1, Infinity));
  const open = () => {
    const key = captions.find((one) => rating(one).plausibility === null);
    if (key === undefined) return show(study.items.length);
    const to = study.items.findIndex((item) => key.startsWith(`${item.id}/`));
    show(to, study.items[to].captions.findIndex(([letter]) => key === `${study.items[to].id}/${letter}`));
  };
  const save = () => {
    const content = { format: study.format, version: study.version, study: study.study, title: study.title, rater,
      saved: new Date().toISOString(), complete: numRated() === captions.length, ratings: rows() };
    const url = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
    const slug = study.title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 60) || "captions";
    const link = element("a", { href: url, download: `${slug}-${study.study.slice(0, 8)}-${rater}.json` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
    unsaved = false;
    refresh();
    $("saved").textContent = "File saved";
    say(`Saved ${link.download}`);
  };
  const read = async (file) => {
    if (file.size > MAX_FILE) throw new Error(`${file.name} must have at most ${MAX_FILE / 1e6} MB; choose a file that this page saved.`);
    let found;
    try { found = JSON.parse(await file.text()); } catch { throw new Error(`${file.name} must be JSON; choose a file that this page saved.`); }
    if (found?.format !== study.format || found.study !== study.study) throw new Error(`${file.name} must be a review of this study; choose a file that this page saved.`);
    if (!RATER.test(found.rater)) throw new Error(`${file.name}: rater must be a rater id; choose a file that this page saved.`);
    if (rater && found.rater !== rater) throw new Error(`${file.name} is rater ${found.rater}'s and you are ${rater}; open the page anew to go on as ${found.rater}.`);
    const taken = checked(found.ratings);
    if (!rater) begin(found.rater);
    take(taken);
    keep();
    open();
    say(`Loaded ${plural(taken.length, "rating")} of rater ${rater}`);
  };
  const begin = (name) => {
    rater = name;
    take(recall());
    keep();
    $("start").hidden = true;
    $("work").hidden = false;
    if (ratings.size) open(); else show(0);
  };

  const atItem = (act) => () => at < study.items.length && act();
  const ARROWS = { ArrowDown: atItem(down), ArrowUp: () => (at < study.items.length ? up() : show(at - 1, Infinity)),
    ArrowRight: atItem(() => show(at + 1)), ArrowLeft: () => at > 0 && show(at - 1), Enter: atItem(down) };
  const LETTERS = { r: atItem(() => $("captions").children[active].querySelector("input[type=text]").focus()), u: open, e: save, l: () => $("file").click(),
    0: atItem(() => rate(null)), ...Object.fromEntries([1, 2, 3, 4, 5].map((value) => [value, atItem(() => rate(value))])),
    ...Object.fromEntries(study.defects.map((defect) => [defect.key, atItem(() => toggle(defect.tag))])) };

  document.addEventListener("keydown", (event) => {
    if ($("work").hidden || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const target = event.target, native = target.closest("button, input");
    if (target.matches("input[type=text]")) {
      if (event.key === "Escape" || event.key === "Enter") { event.preventDefault(); activate(active, true); }
      return;
    }
    if (native && (event.key === "Enter" || event.key === " ")) return;
    if (target.matches("input[type=radio]") && event.key.startsWith("Arrow")) return;
    // A key that types no Latin letter is taken by its place: the top row of AZERTY, letters of a Cyrillic layout.
    const place = /^[a-z]$/i.test(event.key) ? undefined : /^(?:Digit|Numpad|Key)([0-5A-Z])$/.exec(event.code)?.[1].toLowerCase();
    const letter = $("keys").checked ? LETTERS[event.key.toLowerCase()] ?? LETTERS[place] : undefined;
    const act = ARROWS[event.key] ?? letter;
    if (!act || event.repeat && letter) return;
    event.preventDefault();
    act();
  });

  const ACTIONS = { save, open, left: () => show(at - 1), load: () => $("file").click() };
  document.addEventListener("click", (event) => ACTIONS[event.target.closest("[data-do]")?.dataset.do]?.());
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    if (file) read(file).catch((error) => fail(error.message));
    $("file").value = "";
  });
  $("begin").addEventListener("submit", (event) => {
    event.preventDefault();
    const name = $("rater").value.trim();
    if (RATER.test(name)) return begin(name);
    fail("Your rater id must be 1 to 40 letters, digits, dots, dashes or underscores.");
  });
  addEventListener("beforeunload", (event) => { if (unsaved && !kept) event.preventDefault(); });
  $("rater").focus();
})();
