from __future__ import annotations

import json
from pathlib import Path

from tiny_run import TinyRun, build

from factory.release.licences import Parent
from factory.release.provenance import fits_of, parents_of, run_facts
from factory.run import Run


def test_the_parents_are_the_training_corpus_and_the_generators_weights(run: TinyRun) -> None:
    assert parents_of(Run(run.path)) == [
        Parent("corpus", "phantom", "Apache-2.0"),
        Parent("weights", "lora-joint", "Apache-2.0"),
    ]


def test_a_source_that_only_tests_models_does_not_bind_a_release(tmp_path: Path) -> None:
    tested = build(tmp_path / "tested", count=10, test_only_source="ham10000")
    assert "ham10000" not in {parent.name for parent in parents_of(tested.path)}
    named = build(tmp_path / "named", count=10, test_only_source="ham10000", parents_from_test=True)
    assert Parent("corpus", "ham10000", "CC-BY-NC-4.0") in parents_of(named.path)


def test_the_base_of_an_adapter_and_what_the_caller_knows_are_parents_too(fresh_run: TinyRun) -> None:
    path = fresh_run.path / "weights" / "lora-joint" / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": {"name": "some-base", "licence": "openrail"}}))
    starter = Parent("weights", "starter", "Apache-2.0")
    found = parents_of(fresh_run.path, [starter])
    assert Parent("weights", "some-base", "openrail") in found and starter in found


def test_weights_that_no_one_describes_are_parents_of_unknown_licence(fresh_run: TinyRun) -> None:
    (fresh_run.path / "weights" / "lora-joint" / "card.json").unlink()
    assert Parent("weights", "weights wwwwwwwwwwww", "") in parents_of(fresh_run.path)


def test_weights_that_do_not_lead_to_samples_do_not_bind(fresh_run: TinyRun) -> None:
    folder = fresh_run.path / "weights" / "mae"
    folder.mkdir()
    (folder / "card.json").write_text(json.dumps({"objective": "mae", "digest": "m", "licence": "CC-BY-NC"}))
    assert {fit.name for fit in fits_of(fresh_run.path)} == {"lora-joint", "mae"}
    assert "mae" not in {parent.name for parent in parents_of(fresh_run.path)}


def test_the_facts_of_a_run_are_what_it_says_of_itself(run: TinyRun, tmp_path: Path) -> None:
    facts = run_facts(run.path)
    assert (facts.name, facts.fingerprint, facts.versions) == ("tiny", "f" * 32, {"dermafactory": "0.1.0"})
    assert set(facts.tables) == {"corpus", "plan", "samples"}
    assert run_facts(tmp_path).tables == {} and parents_of(tmp_path) == []
