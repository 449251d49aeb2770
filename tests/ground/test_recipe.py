"""A recipe is right, or every mistake in it is named at once, by line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from factory import recipe, recipe_yaml
from factory.recipe import Recipe, RecipeError, load


def written(folder: Path, text: str) -> Path:
    file = folder / "x.yaml"
    file.write_text(text)
    return file


def refusal(source: str | Path | None, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(source, list(overrides))
    return str(caught.value)


def test_nothing_given_is_the_defaults() -> None:
    assert load(None, []) == Recipe()


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path, "# all to come\n"), []) == Recipe()


def test_the_file_goes_over_the_defaults_and_set_goes_over_the_file(tmp_path: Path) -> None:
    found = load(written(tmp_path, "plan: {count: 30, size: 64}\n"), ["plan.count=40"])
    assert (found.plan.count, found.plan.size, found.plan.seed) == (40, 64, 0)


@pytest.mark.parametrize("name", ["smoke", "demo", "dermae"])
def test_the_named_recipes_load_and_are_listed(name: str) -> None:
    assert load(name, []) != Recipe()
    assert name in recipe_yaml.recipe_names()


def test_the_smoke_recipe_is_32_px_throughout() -> None:
    smoke = load("smoke", [])
    sizes = (smoke.corpus.phantoms.size, smoke.corpus.min_side, smoke.plan.size, smoke.evaluate.worth.image_size)
    assert sizes == (32, 32, 32, 32)
    assert smoke.corpus.scales == [32]


def test_two_mistakes_are_one_message_with_their_lines(tmp_path: Path) -> None:
    file = written(tmp_path, "gate:\n  min_area: 0.01\n  min_uio: 0.5\nplan:\n  count: thirty\n")
    assert refusal(file) == (
        f"{file} has 2 mistakes:\n"
        "  line 3  gate.min_uio: no such key; did you mean min_iou?\n"
        "  line 5  plan.count: must be an integer of at least 1, got 'thirty'"
    )


def test_a_field_mistake_does_not_hide_a_rule_of_its_section(tmp_path: Path) -> None:
    file = written(tmp_path, "plan:\n  size: 100\n  diagnoses: [nevus, melanomma, foo]\n")
    message = refusal(file)
    assert "line 2  plan.size: must be an integer from 32 to 1024, a multiple of 32, got 100" in message
    assert "line 3  plan.diagnoses: must be a known word, got 'melanomma'; did you mean 'melanoma'?" in message
    assert "got 'foo'; choose one of" in message
    assert "3 mistakes" in message


def test_a_rule_about_a_field_that_is_itself_wrong_is_left_unsaid(tmp_path: Path) -> None:
    file = written(tmp_path, "corpus:\n  scales: [256]\n  min_side: big\n")
    assert "1 mistake:" in refusal(file)  # with min_side unknown, nothing can be said of the scales


def test_an_override_is_named_as_it_was_given() -> None:
    assert refusal("smoke", "plan.cuont=3").endswith(
        "has 1 mistake:\n  --set plan.cuont=3  plan.cuont: no such key; did you mean count?"
    )


def test_a_mistake_of_the_file_stays_one_when_an_override_reaches_below_it(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, "plan: 3\n"), "plan.count=40")
    assert "line 1  plan: must be a section with keys of its own, got 3" in message


@pytest.mark.parametrize("override", ["plan.count", "=3", "plan..count=3"])
def test_an_override_without_key_or_value_is_told_how(override: str) -> None:
    assert f"--set {override}  must be written key=value" in refusal(None, override)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("gate.min_iou=1.5", "must be a number from 0 to 1, got 1.5"),
        ("gate.checkpoints=[0.5, 2]", "gate.checkpoints[1]: must be a number from 0 to 1, got 2"),
        ("fit.lora.learning_rate=0", "must be a number above 0, got 0"),
        ("fit.lora.learning_rate=.inf", "must be a number above 0, got .inf"),
        ("fit.lora.ema_decay=1", "must be a number of at least 0 and below 1, got 1"),
        ("fit.mae.mask_ratio=.nan", "must be a number above 0 and below 1, got .nan"),
        ("synthesize.num_actors=0", "must be an integer of at least 1 or null, got 0"),
        ("synthesize.keep_rejected=imag", "must be one of none, latents, image, got 'imag'; did you mean image?"),
        ("fit.mae.norm_pix_loss=yes", "must be true or false, got 'yes'"),
        ("release.name=2024", "must be a text, got 2024"),
        ("plan.count=1e3", "must be an integer of at least 1, got 1e3"),
        ("plan.count=true", "must be an integer of at least 1, got true"),
        ("plan.diagnoses=nevus", "must be a list, each a text, got 'nevus'"),
        ("plan.diagnoses=[nevus, nevus]", "must name each word once"),
        ("plan.count=3", "plan.count: must give every cell at least one sample: 18 cells, got count 3"),
        ("corpus.val_share=0.95", "must leave a training split"),
        ("corpus.scales=[512]", "corpus.scales: must hold a rung not above min_side (128)"),
        ("count=3", "did you mean corpus.phantoms.count or plan.count?"),
        ("zzz=3", "no such key; choose from corpus, caption"),
        ("plan.count=[1,", "is not valid YAML"),
        ("plan.seed=" + "9" * 5000, "plan.seed: must be an integer of at least 0, got 9999"),
    ],
)
def test_every_kind_of_mistake_says_its_rule(override: str, says: str) -> None:
    assert says in refusal(None, override)


def test_a_key_given_twice_names_both_lines(tmp_path: Path) -> None:
    file = written(tmp_path, "plan:\n  count: 30\n  size: 64\n  count: 40\n")
    assert "line 4  plan.count: is given twice, first on line 2; keep one" in refusal(file)


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("3E2", 300.0), ("1", 1.0), (".5", 0.5), ("2.", 2.0)])
def test_numbers_read_as_in_yaml_1_2(tmp_path: Path, text: str, value: float) -> None:
    assert load(written(tmp_path, f"fit: {{lora: {{learning_rate: {text}}}}}"), []).fit.lora.learning_rate == value


def test_the_traps_of_yaml_1_1_are_gone() -> None:
    found = load(None, ["release.name=no", "plan.count=0100", "corpus.sources.on=2017-01-01"])
    assert (found.release.name, found.plan.count, found.corpus.sources) == ("no", 100, {"on": "2017-01-01"})


def test_a_section_with_everything_commented_out_is_its_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path, "plan:\n  # count: 3\ngate:\n"), []) == Recipe()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &x [1]\nb: *x\n", "line 1  anchors and aliases are not used"),
        ("plan: {seed: !!python/object:os.system 3}", "tags such as !!python are not used"),
        ("plan: " + "[" * 50 + "]" * 50, "nested at most 20 deep"),
        ("plan: {}\n---\nplan: {}\n", "line 2  a recipe must be one document"),
        ("- plan\n", "a recipe must be a mapping of sections"),
        ("plan:\n\tcount: 3\n", "line 2  is not valid YAML"),
        ("plan: \x00\n", "is not valid YAML"),
        ("? [plan, count]\n: 3\n", "a key must be a plain word"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(written(tmp_path, text))


def test_a_bomb_of_aliases_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    levels = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12)]  # 9^12 words if unfolded
    assert "anchors and aliases" in refusal(written(tmp_path, "\n".join(levels)))


def test_a_file_that_is_large_binary_or_absent_is_refused(tmp_path: Path) -> None:
    large, binary = tmp_path / "large.yaml", tmp_path / "binary.yaml"
    large.write_bytes(b"#" * (recipe_yaml.MAX_BYTES + 1))
    binary.write_bytes(b"plan: \xff\xfe")
    assert "must be at most 262,144 bytes" in refusal(large)
    assert "must be UTF-8 text, got byte 6" in refusal(binary)
    assert "cannot be read: No such file" in refusal(str(tmp_path / "none.yaml"))
    assert "cannot be read: Is a directory" in refusal(tmp_path)


def test_an_unknown_name_lists_those_there_are() -> None:
    assert re.search(r"must be one of .*demo.*smoke, sweeps, got 'smoek'; did you mean smoke\?", refusal("smoek"))


def test_mistakes_are_told_apart_for_programs() -> None:
    with pytest.raises(RecipeError) as caught:
        load(None, ["plan.count=0"])
    (mistake,) = caught.value.mistakes
    assert (mistake.where, mistake.field) == ("--set plan.count=0", "plan.count")


TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["no", "1e4", "010", "0x1", "null", "~", ".5", "1:30", "yes"]))


@given(name=TEXTS, rate=st.floats(1e-12, 1e6), weights=TEXTS)
def test_a_resolved_recipe_loads_to_itself(name: str, rate: float, weights: str) -> None:
    data: dict[str, Any] = {
        "release": {"name": name},
        "fit": {"lora": {"learning_rate": rate}},
        "gate": {"weights": weights},
    }
    wanted = Recipe.model_validate(data)
    reader = recipe_yaml._Reader()
    assert Recipe.model_validate(reader.read(recipe.resolved_yaml(wanted))) == wanted
    assert not reader.mistakes


@given(st.text(max_size=60))
def test_no_text_whatever_is_anything_but_a_recipe_or_a_recipe_error(text: str) -> None:
    try:
        load(None, [text, f"plan.seed={text}"])
    except RecipeError as error:
        assert error.mistakes


def test_the_schema_accepts_the_named_recipes_and_refuses_a_wrong_one() -> None:
    schema = recipe.json_schema()
    for name in recipe_yaml.recipe_names():
        jsonschema.validate(yaml.safe_load(recipe.resolved_yaml(load(name, []))), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"plan": {"count": 0}}, schema)
