/* Material's search worker, answered from the index that mdproof.search writes: a query loads the
   shards of its terms, and the text of the pages it shows. Words are split as in mdproof.search. */
"use strict";

const VERSION = "v1";
const HAN = "\\u3400-\\u4dbf\\u4e00-\\u9fff";
const LETTER = "A-Za-z0-9\\u0370-\\u03ff";
const WORD = new RegExp(`[${HAN}]+|[${LETTER}]+(?:[-_@:.+][${LETTER}]+)*`, "g");
const PART = /[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[0-9]+|[\u0370-\u03ff]+/g;
const IS_HAN = new RegExp(`^[${HAN}]`);

const SHOWN = 10; // pages
const SECTIONS = 3; // sections of a page
const LEAST = 0.3; // of the query that a section must have
const EXCERPT = 160; // characters

/* Split a text as mdproof.search.words does: [[word, terms], ...]. */
function words(text) {
  return [...text.matchAll(WORD)].map(([word]) => {
    if (IS_HAN.test(word)) {
      const pairs = [...word].slice(1).map((letter, i) => word[i] + letter);
      return [word, pairs.length ? pairs : [word]];
    }
    const whole = word.toLowerCase();
    const parts = [...word.matchAll(PART)].map(([part]) => part.toLowerCase());
    return [word, [...new Set([whole, ...parts, ...whole.split(/[-_@:.+]/)])]];
  });
}

/* The shard of a term, as in mdproof.search.shard. */
function shardOf(term, shards) {
  let value = 2166136261;
  for (let i = 0; i < term.length; i++) {
    value = Math.imul(value ^ term.charCodeAt(i), 16777619) >>> 0;
  }
  return value % shards;
}

/* How many letters must be inserted, deleted, replaced or swapped with their neighbour. */
function distance(a, b) {
  let before = [];
  let above = [];
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    [before, above, row] = [above, row, [i]];
    for (let j = 1; j <= b.length; j++) {
      const differs = a[i - 1] === b[j - 1] ? 0 : 1;
      row[j] = Math.min(above[j] + 1, row[j - 1] + 1, above[j - 1] + differs);
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) {
        row[j] = Math.min(row[j], before[j - 2] + 1);
      }
    }
  }
  return row[b.length];
}

class Index {
  constructor(folder, load) {
    this.folder = folder;
    this.load = load;
    this.loaded = new Map();
  }

  async get(name) {
    if (!this.loaded.has(name)) {
      const promise = this.load(`${this.folder}${name}.json`);
      promise.catch(() => this.loaded.delete(name)); // the next query asks again
      this.loaded.set(name, promise);
    }
    return this.loaded.get(name);
  }

  async open() {
    const { sections, shards, pages } = await this.get("pages");
    Object.assign(this, { sections, shards, pages, first: [] });
    let total = 0;
    for (const [, , count] of pages) {
      this.first.push(total);
      total += count;
    }
  }

  /* The page of a section, and which of its sections it is. */
  place(section) {
    let [low, high] = [0, this.first.length];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.first[middle] <= section) low = middle;
      else high = middle;
    }
    return [low, section - this.first[low]];
  }

  /* Map each section that has the term to the term's weight there times its rarity. */
  async find(term) {
    const table = await this.get(`terms/${shardOf(term, this.shards)}`);
    const row = Object.hasOwn(table, term) ? table[term] : [];
    const rarity = Math.log(1 + this.sections / (row.length / 2 + 0.5));
    const found = new Map();
    let section = 0;
    for (let i = 0; i < row.length; i += 2) {
      section += row[i];
      found.set(section, row[i + 1] * rarity);
    }
    return found;
  }

  /* The terms that begin with a word, or, where there are none and the word may be misspelt, the
     nearest ones; each with how much it counts. */
  async similar(word, misspelt) {
    const all = await this.get("words");
    let [low, high] = [0, all.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (all[middle] < word) low = middle + 1;
      else high = middle;
    }
    const longer = [];
    for (; low < all.length && all[low].startsWith(word) && longer.length < 40; low++) {
      if (all[low] !== word) longer.push([all[low], 0.7]);
    }
    if (longer.length || !misspelt || word.length < 4) return longer;
    const most = word.length > 7 ? 2 : 1;
    return all
      .filter((term) => Math.abs(term.length - word.length) <= most)
      .map((term) => [term, distance(word, term)])
      .filter(([, far]) => far > 0 && far <= most)
      .sort((a, b) => a[1] - b[1])
      .slice(0, 8)
      .map(([term, far]) => [term, 0.6 / far]);
  }

  /* For one unit of the query, a Chinese pair or a word: how well each section answers it, and
     the terms that stand for a word that is misspelt. */
  async unit(terms) {
    const [whole, ...parts] = terms;
    const best = await this.find(whole);
    const exact = best.size;
    const take = (found, factor) => {
      for (const [section, value] of found) {
        best.set(section, Math.max(best.get(section) || 0, factor * value));
      }
    };
    if (parts.length) {
      const found = await Promise.all(parts.map((part) => this.find(part)));
      const all = [...found[0]].filter(([section]) => found.every((map) => map.has(section)));
      take(
        all.map(([section]) => [section, found.reduce((sum, map) => sum + map.get(section), 0)]),
        0.45,
      );
    }
    let meant = [];
    if (exact < 3 && !IS_HAN.test(whole)) {
      const others = await this.similar(whole, !best.size);
      for (const [term, factor] of others) take(await this.find(term), factor);
      meant = others.filter(([term]) => !term.startsWith(whole)).map(([term]) => term);
    }
    return { best, meant };
  }

  /* The pages that answer a query, best first: [[page, score, [[section, score, words]]]], and
     what each misspelt word may mean. */
  async search(query) {
    const units = words(query).flatMap(([word, terms]) =>
      IS_HAN.test(word)
        ? terms.map((term) => ({ word, terms: [term], weight: 0.5 }))
        : [{ word, terms, weight: 1 }],
    );
    const found = await Promise.all(units.map(({ terms }) => this.unit(terms)));
    const total = units.reduce((sum, { weight }) => sum + weight, 0);
    const sections = new Map(); // to [score, how much of the query, its words]
    units.forEach(({ word, weight }, i) => {
      for (const [section, value] of found[i].best) {
        const entry = sections.get(section) || [0, 0, new Set()];
        entry[0] += value * weight;
        entry[1] += weight / total;
        entry[2].add(word);
        sections.set(section, entry);
      }
    });
    const pages = new Map();
    for (const [section, [score, share, has]] of sections) {
      if (share < LEAST) continue;
      const [page, position] = this.place(section);
      if (!pages.has(page)) pages.set(page, []);
      pages.get(page).push([position, score * share * share, has]);
    }
    const meant = new Map(
      units.map(({ word }, i) => [word, found[i].meant]).filter(([, terms]) => terms.length),
    );
    const ranked = [...pages]
      .map(([page, list]) => {
        list.sort((a, b) => b[1] - a[1] || a[0] - b[0]);
        const sum = list.reduce((all, [, score]) => all + score, 0);
        return [page, list[0][1] + 0.08 * Math.min(sum, 6 * list[0][1]), list.slice(0, SECTIONS)];
      })
      .sort((a, b) => b[1] - a[1] || a[0] - b[0])
      .slice(0, SHOWN);
    return { ranked, meant };
  }

  /* The answer in the shape that Material shows. */
  async answer(query) {
    const { ranked, meant } = await this.search(query);
    const said = words(query).map(([word]) => word);
    const asked = said.flatMap((word) => meant.get(word) ?? [word]);
    return Promise.all(
      ranked.map(async ([page, score, list]) => {
        const [location, title] = this.pages[page];
        const texts = await this.get(`text/${page}`);
        const items = list.map(([position, value, has], i) => {
          const [anchor, heading, text] = texts[position];
          return {
            location: location + anchor,
            title: mark(heading, asked),
            text: mark(excerpt(text, asked), asked),
            score: i ? Math.min(value, score) : score,
            terms: Object.fromEntries(
              said.flatMap((word) => (meant.get(word) ?? [word]).map((term) => [term, has.has(word)])),
            ),
          };
        });
        if (items.every((item) => item.location.includes("#"))) {
          items.push({ location, title: mark(title, asked), text: "", score: 0, terms: {} });
        }
        return items;
      }),
    );
  }
}

/* The part of a text around the first word of the query, or around its first pair. */
function excerpt(text, asked) {
  const low = text.toLowerCase();
  const wanted = [
    ...asked.map((word) => word.toLowerCase()),
    ...asked.flatMap((word) => words(word).flatMap(([, terms]) => terms)),
  ];
  const at = wanted.map((word) => low.indexOf(word)).find((position) => position >= 0) ?? 0;
  const start = Math.max(0, at - 40);
  const end = start + EXCERPT;
  return (start ? "…" : "") + text.slice(start, end) + (end < text.length ? "…" : "");
}

const escapeHTML = (text) =>
  text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

/* The text as HTML, with the words of the query marked. */
function mark(text, asked) {
  const found = new Set(asked);
  for (const word of asked) {
    if (text.toLowerCase().includes(word.toLowerCase())) continue;
    for (const [, terms] of words(word)) for (const term of terms) found.add(term);
  }
  if (!found.size) return escapeHTML(text);
  const any = [...found]
    .sort((a, b) => b.length - a.length)
    .map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  return text
    .split(new RegExp(`(${any.join("|")})`, "gi"))
    .map((piece, i) => (i % 2 ? `<mark data-md-highlight>${escapeHTML(piece)}</mark>` : escapeHTML(piece)))
    .join("");
}

const [SETUP, READY, QUERY, RESULT] = [0, 1, 2, 3]; // Material's messages
let index;
let latest = 0;

async function load(address) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(`${response.status} for ${address}`);
  return response.json();
}

addEventListener("message", async ({ data: { type, data } }) => {
  if (type === SETUP) {
    const site = self.location.href.replace(/assets\/javascripts\/.*$/, "");
    index = new Index(`${site}search/${VERSION}/`, load);
    await index.open();
    postMessage({ type: READY });
  } else if (type === QUERY) {
    const turn = ++latest;
    const items = await index.answer(data);
    if (turn === latest) postMessage({ type: RESULT, data: { items } }); // not after a later query's
  }
});
