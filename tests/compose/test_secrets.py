"""A secret comes from the environment by name, or not at all."""

from __future__ import annotations

import pytest

from pkuslurm.compose import compose, reload
from pkuslurm.errors import PkuslurmError


@pytest.fixture(scope="module")
def kept() -> str:
    return compose([]).yaml


def test_a_secret_is_kept_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    named = "${oc.env:HF_TOKEN}"
    composed = compose([f"cluster.env.HF_TOKEN={named}", f"cluster.jobs.train.env.API_KEY={named}"])
    assert composed.config.cluster.env == {"HF_TOKEN": named}
    assert composed.config.cluster.jobs["train"]["env"] == {"API_KEY": named}
    assert {item.value for item in composed.settings} == {named}
    again = reload(composed.yaml, [])
    assert again.config.cluster.env == {"HF_TOKEN": named}
    assert "hf_very_secret" not in repr((composed, again))


def test_any_variable_may_come_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROXY_X", "http://p")
    config = compose(["cluster.env.http_proxy=${oc.env:PROXY_X}", "cluster.env.B=x${oc.env:PROXY_X}"]).config
    assert config.cluster.env == {"http_proxy": "${oc.env:PROXY_X}", "B": "xhttp://p"}


def test_a_variable_that_is_not_set_is_refused_unless_nothing_will_run() -> None:
    typed = "cluster.env.HF_TOKEN=${oc.env:HF_TOKEN}"
    with pytest.raises(PkuslurmError, match="HF_TOKEN is not set; export HF_TOKEN=…"):
        compose([typed])
    assert compose([typed, "dry_run=true"]).config.cluster.env == {"HF_TOKEN": "${oc.env:HF_TOKEN}"}


@pytest.mark.parametrize(
    "typed",
    [
        "cluster.env.HF_TOKEN=hunter2x",
        "cluster.env.DB_PASSWORD=12345",
        "cluster.env.api_key=hunter2x",
        "cluster.env={MY_SECRET: hunter2x}",
        "cluster.env.HF_TOKEN=${oc.env:HF_TOKEN,hunter2x}",
        "cluster.env.AUTH=Bearer ${oc.env:HF_TOKEN}",
        "cluster.jobs.infer.env.MY_SECRET=hunter2x",
        "cluster.jobs.infer={env: {MY_SECRET: hunter2x}}",
        "cluster.extra.comment=TOKEN=hunter2x",
        "cluster.extra.comment=${oc.env:HF_TOKEN}",
        "cluster.setup=[export HF_TOKEN=hunter2x]",
        "infer.prompts=[${oc.env:HF_TOKEN}]",
        "train.hf_hub_token=hunter2x",
        "train.hub_token=${oc.env:HF_TOKEN}",
        "train.swanlab_api_key=hunter2x",
        "merge.hf_hub_token=hunter2x",
    ],
)
def test_a_secret_that_would_be_written_down_is_refused(typed: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2y")
    with pytest.raises(PkuslurmError, match=r"secret .*export \w+.*=\$\{oc\.env:\w+\}") as refusal:
        reload(kept, [typed])
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize(
    "typed",
    [
        "train.split_special_tokens=false",
        "train.include_num_input_tokens_seen=true",
        "train.skip_special_tokens=true",
        "train.add_tokens=a",
        "train.hf_hub_token=null",
        "cluster.env.TOKENIZERS_PARALLELISM=false",
        "cluster.env.HF_TOKEN=",
        "cluster.setup=[export HF_TOKEN=$MY_TOKEN]",
    ],
)
def test_what_only_sounds_like_a_secret_is_none(typed: str, kept: str) -> None:
    assert reload(kept, [typed]).overrides == (typed,)
