"""The Markdown extension `mdproof.markdown`: collects a page's fences and shows their proofs.

It runs in every builder that runs Python-Markdown. It takes the fences in Python from
`pymdownx.superfences`, which must be listed before it.
"""

import functools
import html
import logging
import os
import re
from dataclasses import dataclass, field, replace
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor
from markdown.preprocessors import Preprocessor

from mdproof.article import read_article
from mdproof.benchmark import benchmark_outdated
from mdproof.block import HIGHLIGHT, LOOKS_RUNNABLE, RUNNABLE, Block, Options, read_options
from mdproof.collect import FENCE, read_page, shown
from mdproof.copy import is_recorded, recorded_copy
from mdproof.device import outdated, ways_of
from mdproof.errors import PageError, build_error
from mdproof.lines import align
from mdproof.names import Program, read_program
from mdproof.proof import ForgedError, Proof, figure_folder, load_proof, record_reason
from mdproof.reference import UnknownNameError, find_source, reference_target
from mdproof.render import link_names, render_block
from mdproof.site import (
    Site,
    enter_site,
    is_collecting,
    link,
    load_site,
    making_pipeline,
    page_of,
)
from mdproof.words import words

# A child of MkDocs' own logger: a warning here fails `mkdocs build --strict`.
_log = logging.getLogger("mkdocs.plugins.mdproof")


_PROMPT = re.compile(r">>>(?: |$)")

MIXED = "a console fence is a shell's or Python's (>>> in its first line): make two of it"

NEEDS_FENCES = "markdown_extensions: list pymdownx.superfences before mdproof.markdown"


@dataclass
class State:
    """What is known of the page being converted."""

    page: str | None = None
    raw: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    listings: list[tuple[str, int]] = field(default_factory=list)
    proof: Proof | None = None
    loaded: bool = False
    ended: bool = False
    stale: list[tuple[int, str]] = field(default_factory=list)


class _Page(Preprocessor):
    """Learns which page is converted, and that its fences still come to us."""

    def __init__(self, md: Markdown, fences: Any) -> None:
        super().__init__(md)
        self.fences = fences

    def run(self, lines: list[str]) -> list[str]:
        md: Any = self.md
        state: State = md.mdproof_state
        page = page_of(md)
        if page is None:
            return lines
        if _superfences(md) is not self.fences:
            raise build_error(PageError("mkdocs.yml", 1, NEEDS_FENCES))
        if not is_collecting(md):
            enter_site(md)
        site = load_site()
        try:
            text = read_page(site, page)
            if site.is_article(page):
                read_article(site, page)
        except PageError as error:
            raise build_error(error) from None
        except FileNotFoundError:
            return lines  # a page that a plugin generates has no blocks of ours
        state.page = page
        state.raw = text.split("\n")
        return lines


class _End(Postprocessor):
    """Says what is stale, and that a page has as many blocks as its proof."""

    def run(self, text: str) -> str:
        md: Any = self.md
        state: State = md.mdproof_state
        if state.page is None or is_collecting(md) or state.ended:
            return text
        state.ended = True  # a table of contents runs postprocessors for every heading
        site = load_site()
        file = shown(site, state.page)
        if state.proof is not None and len(state.proof.blocks) != len(state.blocks):
            count = f"{len(state.blocks)} blocks, {len(state.proof.blocks)} in the proof"
            state.stale.append((1, count))
        for line, reason in state.stale:
            message = f"{file}:{line}: stale proof ({reason}); run `pytest docs --update`"
            if os.environ.get("MDPROOF_STRICT", "") not in ("", "0"):
                raise build_error(PageError(file, line, message.split(": ", 1)[1]))
            _log.warning(message)
        return text


class MdproofExtension(Extension):
    """Runs nothing: it shows what was recorded when the page ran."""

    def __init__(self, **kwargs: Any) -> None:
        self.config = {
            "libraries": [["torch", "triton"], "Libraries whose versions the chip names"],
        }
        super().__init__(**kwargs)

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Take over the fences in Python."""
        # The one in use: `pymdownx.extra` brings a second, which takes the place of the first.
        fences = _superfences(md)
        if fences is None:
            raise build_error(PageError("mkdocs.yml", 1, NEEDS_FENCES))
        if not making_pipeline.get():
            _check_encoding()
        md.registerExtension(self)
        self.md: Any = md
        self.fences = fences
        self.reset()
        md.preprocessors.register(_Page(md, fences), "mdproof_page", 1000)
        md.postprocessors.register(_End(md), "mdproof_end", -1000)
        for language in RUNNABLE:
            self.fences.extend_super_fences(language, self.format, self.validate, None)
        self.fences.extend_super_fences("console", self.console, self.validate, None)
        self._count_listings()
        self._remember_lines()

    def reset(self) -> None:
        """Forget the last page."""
        self.md.mdproof_state = State()

    @property
    def state(self) -> State:
        """What is known of the page being converted."""
        return self.md.mdproof_state

    def _count_listings(self) -> None:
        default = self.fences.superfences[0]
        highlight = default["formatter"]

        def listing(*, src: str, language: str, **kwargs: Any) -> str:
            state, line = self.state, self._line()
            looks = state.page is not None and (language or "").lower() in LOOKS_RUNNABLE
            if looks and not load_site().lenient:
                assert state.page is not None
                message = f"```{language} is shown and not run: write ```python, or norun and why"
                raise build_error(PageError(shown(load_site(), state.page), line, message))
            state.listings.append((language or "", line))
            return highlight(src=src, language=language, **kwargs)

        default["formatter"] = self.listing = listing
        indented = self.md.parser.blockprocessors["code"]
        run = indented.run

        def run_indented(parent: Any, blocks: list[str]) -> Any:
            before = len(list(parent.iter("code")))
            result = run(parent, blocks)
            if len(list(parent.iter("code"))) > before:
                text = "".join(parent[-1].itertext()).strip().split("\n")[0]
                self.state.listings.append(("", self._find(text)))
            return result

        indented.run = run_indented

    def _remember_lines(self) -> None:
        # superfences knows where a fence stands but does not tell its formatter.
        fenced = self.md.preprocessors["fenced_code_block"]
        process, search = fenced.process_nested_block, fenced.search_nested

        def process_nested_block(ws: str, content: str, start: int, end: int) -> None:
            self.start = start
            process(ws, content, start, end)

        def search_nested(lines: list[str]) -> list[str]:
            state = self.state
            if state.page is None:
                return search(lines)
            state.places = align(state.raw, lines)
            left = search(list(lines))
            fences = [at for at, line in enumerate(left) if FENCE.match(line)]
            if fences and is_collecting(self.md):
                places = align(lines, left)
                state.left = [state.places[places[at]] + 1 for at in fences]
            return left

        fenced.process_nested_block = process_nested_block
        fenced.search_nested = search_nested
        self.start = 0

    def _line(self) -> int:
        """Return the line of the fence being formatted, in the file, from 1."""
        places = self.state.places
        return places[self.start] + 1 if self.start < len(places) else 1

    def _find(self, text: str) -> int:
        lines = enumerate(self.state.raw, 1)
        return next((number for number, line in lines if text and text in line), 1)

    def validate(
        self, language: str, inputs: dict[str, Any], options: dict[str, Any], attrs: Any, md: Any
    ) -> bool:
        """Keep our options away from the highlighter; they are read when the line is known."""
        from pymdownx.superfences import highlight_validator

        md.preprocessors["fenced_code_block"].get_hl_settings()
        theirs = {key: value for key, value in inputs.items() if key in HIGHLIGHT}
        highlight_validator(language, theirs, options, attrs, md)
        options["mdproof"] = {key: v for key, v in inputs.items() if key not in HIGHLIGHT} | attrs
        attrs.clear()
        return True

    def console(self, src: str = "", options: Any = None, md: Any = None, **kwargs: Any) -> str:
        """Return the HTML of a `console` fence: a session in Python, or a listing of a shell's."""
        kwargs.pop("language", None)
        lines = src.strip().split("\n")
        python = [bool(_PROMPT.match(line)) for line in lines]
        if python[0]:
            return self.format(src, "pycon", options, md, **kwargs)
        state = self.state
        if any(python) and state.page is not None and not load_site().lenient:
            file, line = shown(load_site(), state.page), self._line()
            raise build_error(PageError(file, line, MIXED))
        options = dict(options or {})
        kwargs["attrs"] = {**options.pop("mdproof", {}), **(kwargs.get("attrs") or {})}
        return self.listing(src=src, language="console", options=options, md=md, **kwargs)

    def format(
        self,
        src: str = "",
        language: str = "",
        options: dict[str, Any] | None = None,
        md: Any = None,
        **kwargs: Any,
    ) -> str:
        """Return the HTML of a fence."""
        options = dict(options or {})
        ours = options.pop("mdproof", {})
        classes, id_value = kwargs.get("classes") or [], kwargs.get("id_value") or ""

        def highlighted(code: str, language: str) -> str:
            return md.preprocessors["fenced_code_block"].highlight(
                src=code,
                language=language,
                options=options,
                md=md,
                classes=classes,
                id_value=id_value,
                attrs={},
            )

        state = self.state
        if state.page is None:  # a docstring, or text outside a builder
            return highlighted(src, language)
        site = load_site()
        line = self._line()
        try:
            block = self._block(site, src, language, ours, line)
            if is_collecting(md):
                state.blocks.append(block)
                return f'<div data-mdproof-block="{block.index}"><pre></pre></div>'
            state.blocks.append(block)
            return self._render(site, block, highlighted)
        except PageError as error:
            raise build_error(error) from None

    def _block(self, site: Site, src: str, language: str, ours: dict[str, Any], line: int) -> Block:
        state = self.state
        assert state.page is not None
        file = shown(site, state.page)
        if site.lenient:
            ours = {key: ours[key] for key in ours if key in Options.__dataclass_fields__}
        read = read_options(ours, file=file, line=line)
        kind, code, seen = RUNNABLE[language], src, ""
        if read.source:
            if src.strip():
                raise PageError(file, line, "a source fence is empty: the engine fills it")
            try:
                source = find_source(read.source, site)
            except UnknownNameError as error:
                raise PageError(file, line, f'source="{read.source}": {error}') from None
            module = _module_of(read.source, source.kind)
            name = read.source[len(module) + 1 :].partition(".")[0]
            kind, code = "source", f"from {module} import {name}" if name else f"import {module}"
            seen = _dedent(source.text)
        elif not src.strip() and not site.lenient:
            raise PageError(file, line, "this fence is empty")
        return Block(state.page, len(state.blocks) + 1, line, kind, code, read, seen)

    def _render(self, site: Site, block: Block, highlighted: Any) -> str:
        state = self.state
        page = block.page
        file = shown(site, page)
        if not state.loaded:
            state.loaded = True
            try:
                state.proof = load_proof(site, page)
            except ForgedError as error:
                raise PageError(file, block.line, str(error)) from None
        record, reason = self._record(site)
        if reason:
            state.stale.append((block.line, f"block {block.index} {reason}"))
        language = words(site, page)
        code, document = block.code, ""
        if block.kind == "source":
            code, document = self._source(site, block, language)
        links = record.get("links", {}) if record is not None and not reason else {}

        def target(dotted: str) -> str | None:
            found = reference_target(dotted, site)
            exists = found and (site.docs / found.partition("#")[0]).is_file()
            return link(self.md, found) if found and exists else None

        program = read_program(block.shown or code, kind=block.kind)
        if block.kind == "source":
            program = _folded(program, block.shown, code)
        pretty = highlighted(code, "pycon" if block.kind == "doctest" else "python")
        copy = recorded_copy(site, state.blocks, record) if record and not reason else None
        if copy and record and not is_recorded(site, state.blocks, record, copy):
            state.stale.append((block.line, f"the copy of block {block.index} changed"))
            copy = None
        folder = figure_folder(site, page).relative_to(site.docs).as_posix()
        return render_block(
            block,
            link_names(pretty, code, program, links, target),
            record=record,
            reason=reason,
            copy=copy,
            words=language,
            shown_libraries=self.getConfig("libraries"),
            figure=lambda name: link(self.md, f"{folder}/{name}"),
            caption=self._caption(block, file),
            document=document,
            outdated={
                str(w.get("device")): outdated(site, state.blocks, w) for w in ways_of(record)
            },
            remeasure={
                str(w.get("device")): benchmark_outdated(site, page, w) for w in ways_of(record)
            },
        )

    def _caption(self, block: Block, file: str) -> str:
        """Return a caption as HTML, its mathematics rendered where the site renders any."""
        text = block.options.caption
        if not any(type(e).__name__ == "MathsExtension" for e in self.md.registeredExtensions):
            return html.escape(text)
        from mdproof.katex import TexError
        from mdproof.maths import render_inline

        try:
            return render_inline(text)
        except TexError as error:
            raise PageError(file, block.line, f"caption: {error}") from None

    def _record(self, site: Site) -> tuple[dict[str, Any] | None, str]:
        state = self.state
        position = len(state.blocks) - 1
        if state.proof is None or position >= len(state.proof.blocks):
            return None, "is not proven yet"
        record = state.proof.blocks[position]
        return record, record_reason(site, state.blocks, state.proof.blocks[: position + 1])

    def _source(self, site: Site, block: Block, language: dict[str, str]) -> tuple[str, str]:
        """Return an object's code with its docstring folded, and the folded docstring."""
        source = find_source(block.options.source, site)
        lines = source.text.rstrip("\n").split("\n")
        folded = ""
        if source.docstring_span is not None and source.kind != "constant":
            first, last = (number - source.first_line for number in source.docstring_span)
            folded = "\n".join(lines[first : last + 1])
            if last > first:
                quote = '"""' if '"""' in lines[first] else "'''"
                lines[first : last + 1] = [lines[first].rstrip() + f" …{quote}"]
            else:
                folded = ""
        code = _dedent("\n".join(lines))
        href = reference_target(block.options.source, site)
        parts = []
        if folded:
            parts.append(
                f'<details class="mdproof-doc"><summary>{language["doc"]}</summary>'
                f'<pre tabindex="0"><code>{html.escape(_dedent(folded))}</code></pre></details>'
            )
        if href and (site.docs / href.partition("#")[0]).is_file():
            parts.append(
                f'<a class="mdproof-source" href="{html.escape(link(self.md, href))}">'
                f"<code>{block.options.source}</code> · {language['reference']}</a>"
            )
        inner = "".join(parts)
        return code, f'<div class="mdproof-foot">{inner}</div>' if inner else ""


def _folded(program: Program, whole: str, shown: str) -> Program:
    """Return a program's references where they stand once its docstring is folded into one line."""
    before, after = whole.split("\n"), shown.split("\n")
    gone = len(before) - len(after)
    first = next((n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
    if not gone:
        return program
    last = first + gone + 1  # the lines of the docstring, counted from 1
    moved = [
        replace(one, line=one.line - gone if one.line > last else one.line)
        for one in program.references
    ]
    return Program(tuple(moved), program.statements)


def _superfences(md: Any) -> Any:
    """Return the extension that takes the fences, if it is `pymdownx.superfences`."""
    if "fenced_code_block" not in md.preprocessors:
        return None
    extension = getattr(md.preprocessors["fenced_code_block"], "extension", None)
    return extension if type(extension).__name__ == "SuperFencesCodeExtension" else None


def _check_encoding() -> None:
    """Refuse a page that is not UTF-8 here, before a builder does it with a traceback."""
    try:
        site = load_site()
    except FileNotFoundError:
        return
    except PageError as error:
        raise build_error(error) from None
    for page in site.pages():
        _check_page(site, page, (site.docs / page).stat().st_mtime_ns)


@functools.lru_cache(maxsize=65536)
def _check_page(site: Site, page: str, mtime: int) -> None:
    try:
        read_page(site, page)
    except PageError as error:
        raise build_error(error) from None


def _module_of(dotted: str, kind: str) -> str:
    if kind == "module":
        return dotted
    depth = 2 if kind == "method" else 1
    return dotted.rsplit(".", depth)[0]


def _dedent(text: str) -> str:
    margin = min((len(m[0]) for m in re.finditer(r"^ *(?=\S)", text, re.MULTILINE)), default=0)
    return re.sub(rf"^ {{{margin}}}", "", text, flags=re.MULTILINE).rstrip("\n")


def makeExtension(**kwargs: Any) -> MdproofExtension:  # noqa: N802
    """Return the extension, as Python-Markdown asks for it."""
    return MdproofExtension(**kwargs)
