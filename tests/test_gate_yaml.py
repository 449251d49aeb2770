"""The gate's Serve config for a cluster: what Serve drops without a word when misspelt is caught here."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from factory.gateway.settings import Settings, is_loopback
from factory.recipe import GateSection
from factory.runtime import gate_http

PATH = Path(__file__).resolve().parent.parent / "cluster" / "gate.yaml"


def config() -> dict[str, Any]:
    return dict(yaml.safe_load(PATH.read_text()))


def test_serve_takes_the_config_and_knows_every_key_of_it() -> None:
    found = config()
    schema = ServeDeploySchema.model_validate(found)
    (app,) = found["applications"]
    assert not set(found) - set(ServeDeploySchema.model_fields)
    assert not set(found["http_options"]) - set(type(schema.http_options).model_fields)
    assert not set(app) - set(ServeApplicationSchema.model_fields)
    assert all(not set(each) - set(DeploymentSchema.model_fields) for each in app["deployments"])
    assert {each["name"] for each in app["deployments"]} == {gate_http.GATE, gate_http.INGRESS}


def test_its_builder_its_arguments_and_its_policy_are_the_projects_own() -> None:
    (app,) = config()["applications"]
    module, _, name = app["import_path"].partition(":")
    assert getattr(importlib.import_module(module), name) is gate_http.application
    arguments = gate_http.GateArguments.model_validate(app["args"])
    assert arguments.settings.require_token and is_loopback(config()["http_options"]["host"])
    defaults = Settings()
    assert config()["http_options"]["request_timeout_s"] > defaults.body_s + defaults.answer_s
    policy = next(each["user_config"] for each in app["deployments"] if each["name"] == gate_http.GATE)
    assert GateSection(**policy) == GateSection(), "the file states another policy than the default"
    with pytest.raises(ValidationError, match="max_wating"):
        gate_http.GateArguments.model_validate(app["args"] | {"settings": {"max_wating": 1}})


def test_a_change_of_the_policy_alone_is_the_same_application_to_serve() -> None:
    from ray.serve._private.deploy_utils import get_app_code_version

    arguments = gate_http.GateArguments()
    configs = [gate_http.config_of(arguments, GateSection(min_iou=share)) for share in (0.7, 0.9)]
    apps = [ServeDeploySchema.model_validate(each).applications[0] for each in configs]
    assert apps[0] != apps[1] and get_app_code_version(apps[0]) == get_app_code_version(apps[1])
    other = gate_http.config_of(gate_http.GateArguments(num_threads=2), GateSection())
    assert get_app_code_version(ServeDeploySchema.model_validate(other).applications[0]) != get_app_code_version(
        apps[0]
    )
