"""Reading a recipe: YAML in, a checked `Recipe` out, or one message that names every mistake by its line.

    jobs/recipes/x.yaml has 2 mistakes:
      line 12  gate.min_uio: no such key; did you mean min_iou?
      line 14  plan.count: must be an integer of at least 1, got 'thirty'

Scalars are read by YAML 1.2's rules, so that `1e-4` is a number and `no` is a word. Anchors, aliases and tags have
no use in a recipe and are refused, which also keeps a small file from unfolding into a large one.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from factory.recipe import Mistake, Recipe, RecipeError, json_schema
from factory.taxonomy import nearest

MAX_BYTES = 262_144
_MAX_DEPTH = 20
_INT = re.compile(r"[-+]?[0-9]{1,100}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True), **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", "+.inf"), float("inf")), "-.inf": float("-inf"), ".nan": float("nan"),
}  # fmt: skip

Path_ = tuple[str | int, ...]  # from the recipe's root: ("corpus", "scales", 1)
Schema = Mapping[str, Any]


def load(source: str | Path | None, overrides: Iterable[str], base: Recipe | None = None) -> Recipe:
    """See factory.recipe.load."""
    reader = _Reader()
    if source is not None:
        name, text = _find(source)
    else:
        name, text = "the recipe", "" if base is None else resolved_yaml(base)
    data = reader.read(text)
    for override in overrides:
        reader.override(data, override)
    recipe = reader.validated(data)
    if reader.mistakes or recipe is None:
        raise RecipeError(name, reader.sorted_mistakes())
    return recipe


def resolved_yaml(recipe: Recipe) -> str:
    """The whole recipe with every default filled in; loading it again gives the same recipe."""
    return yaml.dump(
        recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110
    )


class _Dumper(yaml.SafeDumper):
    """Quotes a text that this reader would take for a number (YAML 1.1 takes `1e4` for a text)."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(_plain(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)


# Finding a recipe.


def recipe_folders() -> list[Traversable]:
    """Where named recipes lie: inside the installed package, or in jobs/recipes of the source tree."""
    package = importlib.resources.files("factory")
    folders: list[Traversable] = [package / "recipes", Path(__file__).parent.parent / "jobs" / "recipes"]
    return [folder for folder in folders if folder.is_dir()]


def recipe_names() -> list[str]:
    """The named recipes."""
    files = (file.name for folder in recipe_folders() for file in folder.iterdir())
    return sorted({name.removesuffix(".yaml") for name in files if name.endswith(".yaml")})


def _find(source: str | Path) -> tuple[str, str]:
    """What to call a recipe, and its text."""
    text = str(source)
    if isinstance(source, Path) or "/" in text or text.endswith((".yaml", ".yml")):
        return text, _text(text, Path(text).expanduser())
    for folder in recipe_folders():
        if text and (file := folder / f"{text}.yaml").is_file():
            shown = _shown(file)
            return shown, _text(shown, file)
    names = recipe_names()
    near = nearest(text, names)
    hint = f"did you mean {near}?" if near else "or give the path of a YAML file"
    raise RecipeError(
        "the recipe", [Mistake("--recipe", "", f"must be one of {', '.join(names)}, got {text!r}; {hint}")]
    )


def _shown(file: Traversable) -> str:
    if isinstance(file, Path) and file.is_relative_to(Path.cwd()):
        return str(file.relative_to(Path.cwd()))
    return str(file)


def _text(name: str, file: Traversable) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise RecipeError(name, [Mistake("file", "", f"must be at most {MAX_BYTES:,} bytes; is it a recipe?")])
        return data.decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(name, [Mistake("file", "", f"cannot be read: {error.strerror or error}")]) from error
    except UnicodeDecodeError as error:
        raise RecipeError(name, [Mistake("file", "", f"must be UTF-8 text, got byte {error.start}")]) from error


# Reading YAML, with the line of everything.


def _plain(text: str) -> Any:
    """The value of an unquoted scalar (YAML 1.2, core schema, decimal)."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


class _Reader:
    """Collects the mistakes of one recipe, and where each of its values was written."""

    def __init__(self) -> None:
        self.mistakes: list[tuple[int, Mistake]] = []
        self.places: dict[Path_, tuple[int, str]] = {}  # path -> (order, "line 12")
        self.raw: dict[Path_, str] = {}  # as written
        self._num_overrides = 0

    def sorted_mistakes(self) -> list[Mistake]:
        return [mistake for _, mistake in sorted(self.mistakes, key=lambda item: item[0])]

    def read(self, text: str) -> dict[str, Any]:
        """The data of a file; {} for an empty one, or for one that is not a recipe at all."""
        node = self._compose(text, None)
        if node is None:
            return {}
        data = self._value(node, (), None)
        if data is None or isinstance(data, dict):
            return data or {}
        self._add(self._line(node, None), "", "a recipe must be a mapping of sections such as `plan:`")
        return {}

    def override(self, data: dict[str, Any], text: str) -> None:
        """Set one `a.b=c` in the data."""
        self._num_overrides += 1
        place = (10**9 + self._num_overrides, f"--set {_shortened(text, 40)}")
        key, equals, value = text.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            self._add(place, "", "must be written key=value, such as plan.count=64")
            return
        node = self._compose(value, place)
        if node is None and value.strip():
            return  # not YAML, and said so
        for depth in range(1, len(names) + 1):
            self.places[tuple(names[:depth])] = (
                place if depth == len(names) else self._place(tuple(names[:depth]), place)
            )
        parent: Any = data
        for name in names[:-1]:
            parent = parent.setdefault(name, {})
            if not isinstance(parent, dict):
                return  # the file put something else there, which is its own mistake
        self._forget_below(tuple(names))
        parent[names[-1]] = None if node is None else self._value(node, tuple(names), place)

    def _forget_below(self, path: Path_) -> None:
        for known in [p for p in self.places if len(p) > len(path) and p[: len(path)] == path]:
            del self.places[known]

    def _compose(self, text: str, place: tuple[int, str] | None) -> yaml.Node | None:
        """The node of the text; None if it is empty or refused."""
        before = len(self.mistakes)
        try:
            self._refuse_what_recipes_lack(text, place)
            if len(self.mistakes) > before:
                return None
            return yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            where = place or _on_line(error.problem_mark or error.context_mark)
            self._add(where, "", f"is not valid YAML: {error.problem or error.context}")
        except yaml.YAMLError as error:
            self._add(place or (0, "file"), "", f"is not valid YAML: {str(error).splitlines()[0]}")
        return None

    def _refuse_what_recipes_lack(self, text: str, place: tuple[int, str] | None) -> None:
        """Events come before any node is built, so nothing has unfolded yet."""
        depth = documents = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            where = place or _on_line(event.start_mark)
            documents += isinstance(event, yaml.DocumentStartEvent)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                return self._add(where, "", "anchors and aliases are not used in recipes; write the value out")
            if getattr(event, "tag", None):
                return self._add(where, "", "tags such as !!python are not used in recipes; write a plain value")
            if depth > _MAX_DEPTH or documents > 1:
                what = "one document" if documents > 1 else f"nested at most {_MAX_DEPTH} deep"
                return self._add(where, "", f"a recipe must be {what}")
        return None

    def _value(self, node: yaml.Node, path: Path_, place: tuple[int, str] | None) -> Any:
        if path not in self.places or place is not None:
            self.places[path] = self._line(node, place)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, place)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, (*path, i), place) for i, child in enumerate(node.value)]
        self.raw[path] = node.value
        return _plain(str(node.value)) if getattr(node, "style", None) is None else node.value

    def _mapping(self, node: yaml.MappingNode, path: Path_, place: tuple[int, str] | None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, child in node.value:
            where = self._line(key, place)
            if not isinstance(key, yaml.ScalarNode):
                self._add(where, _dotted(path), "a key must be a plain word")
                continue
            below = (*path, key.value)
            if key.value in found:
                self._add(where, _dotted(below), f"is given twice, first on {self.places[below][1]}; keep one")
                continue
            self.places[below] = where
            value = self._value(child, below, place)
            # A section whose keys are all commented out is a section left at its defaults.
            found[key.value] = {} if value is None and _properties(_schema_at(below)) else value
        return found

    def _line(self, node: yaml.Node, place: tuple[int, str] | None) -> tuple[int, str]:
        return place or _on_line(node.start_mark)

    def _place(self, path: Path_, otherwise: tuple[int, str]) -> tuple[int, str]:
        """Where the nearest part of the recipe that was written is."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return otherwise

    def _add(self, place: tuple[int, str], field: str, rule: str) -> None:
        self.mistakes.append((place[0], Mistake(place[1], field, rule)))

    # Saying what pydantic found.

    def validated(self, data: dict[str, Any]) -> Recipe | None:
        """The recipe, or None with a mistake noted for every error, at the line of what it is about.

        A section's own rules run only where its fields are right. So what is wrong is taken out and the rest is
        checked once more; a rule that speaks of a field that was taken out is then left unsaid.
        """
        try:
            return Recipe.model_validate(data)
        except ValidationError as error:
            problems = error.errors(include_url=False)
        bad = {_field(problem["loc"]) for problem in problems if problem["type"] != "value_error"}
        try:
            Recipe.model_validate(_without(data, bad))
        except ValidationError as error:
            problems += error.errors(include_url=False)
        names = {str(path[-1]) for path in bad}
        said: list[tuple[Path_, str]] = []
        for problem in problems:
            for path, rule in self._sentences(problem["loc"], problem["type"], problem["msg"], problem["input"]):
                spoken_of = names & set(re.findall(r"\w+", rule)) if problem["type"] == "value_error" else set()
                if (
                    (path, rule) not in said
                    and not spoken_of
                    and not (problem["type"] == "value_error" and path in bad)
                ):
                    said.append((path, rule))
        for path, rule in said:
            self._add(self._place(path, (-1, "recipe")), _dotted(path), rule)
        return None

    def _sentences(self, path: Path_, kind: str, message: str, value: object) -> Iterator[tuple[Path_, str]]:
        if kind == "extra_forbidden":
            yield path, f"no such key; {_nearest(path)}"
        elif kind == "value_error":
            for line in message.removeprefix("Value error, ").splitlines():
                yield self._about(path, line)
        else:
            schema = _schema_at(path)
            got = repr(value) if isinstance(value, str) else self.raw.get(path) or repr(value)
            rule = f"must be {_rule(schema)}" if schema else message
            yield path, f"{rule}, got {_shortened(got)}{_did_you_mean(value, schema)}"

    def _about(self, path: Path_, line: str) -> tuple[Path_, str]:
        """A section's own rule starts with the field it is about: that is where to point."""
        word, _, rest = line.partition(" ")
        if word in _properties(_schema_at(path)):
            return (*path, word), rest if rest.startswith("must") else line
        return path, line


def _on_line(mark: Any) -> tuple[int, str]:
    """The order and the name of the line that a YAML mark (or None) is on."""
    line = 0 if mark is None else int(mark.line)
    return line, f"line {line + 1}"


def _field(path: Path_) -> Path_:
    """The field that an error deep in a list is about."""
    return path[: next((i for i, part in enumerate(path) if isinstance(part, int)), len(path))]


def _without(data: dict[str, Any], bad: set[Path_], path: Path_ = ()) -> dict[str, Any]:
    """A copy of nested data that leaves out the bad paths."""
    return {
        key: _without(value, bad, (*path, key)) if isinstance(value, dict) else value
        for key, value in data.items()
        if (*path, key) not in bad
    }


def _dotted(path: Path_) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _shortened(text: str, width: int = 60) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


# What a field's rule is, in words, from the JSON schema.


@cache
def _root() -> dict[str, Any]:
    return json_schema()


def _resolved(schema: Schema) -> Schema:
    if "$ref" in schema:
        return _resolved(_root()["$defs"][schema["$ref"].rpartition("/")[2]])
    return schema


def _properties(schema: Schema) -> dict[str, Schema]:
    return dict(_resolved(schema).get("properties", {}))


def _schema_at(path: Path_) -> Schema:
    """The schema of a field; {} where there is none."""
    schema: Schema = _root()
    for part in path:
        schema = _resolved(schema)
        if isinstance(part, int):
            schema = schema.get("items", {})
        else:
            extra = schema.get("additionalProperties") or {}
            schema = schema.get("properties", {}).get(part, extra)
    return _resolved(schema)


def _nearest(path: Path_) -> str:
    """The right name for an unknown key: beside it, else elsewhere in the recipe."""
    wrong, siblings = str(path[-1]), list(_properties(_schema_at(path[:-1])))
    near = nearest(wrong, siblings)
    if near:
        return f"did you mean {near}?"
    elsewhere = [_dotted(known) for known in _leaves((), _root()) if known[-1] == wrong]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"choose from {', '.join(siblings)}"


def _leaves(path: Path_, schema: Schema) -> Iterator[Path_]:
    for name, below in _properties(schema).items():
        yield (*path, name)
        yield from _leaves((*path, name), below)


def _did_you_mean(value: object, schema: Schema) -> str:
    near = nearest(str(value), map(str, schema.get("enum", ())))
    return f"; did you mean {near}?" if near else ""


def _rule(schema: Schema) -> str:
    """`an integer of at least 1`, `a number from 0 to 1`, `one of none, latents, image`."""
    schema = _resolved(schema)
    if "anyOf" in schema:
        return " or ".join(_rule(choice) for choice in schema["anyOf"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    kind = schema.get("type", "a value")
    if kind in ("integer", "number"):
        multiple = f", a multiple of {schema['multipleOf']}" if "multipleOf" in schema else ""
        return f"{'an integer' if kind == 'integer' else 'a number'}{_bounds(schema)}{multiple}"
    if kind == "array":
        return f"a list, each {_rule(schema.get('items', {}))}"
    if kind == "object":
        return "a section with keys of its own"
    return {"string": "a text", "boolean": "true or false", "null": "null"}.get(kind, str(kind))


def _bounds(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    lower = f" of at least {low:g}" if low is not None else f" above {above:g}" if above is not None else ""
    upper = f" of at most {high:g}" if high is not None else f" below {below:g}" if below is not None else ""
    return f"{lower} and{upper}" if lower and upper else lower + upper
