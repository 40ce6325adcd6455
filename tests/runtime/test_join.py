"""Refusing and failing as one rank of torchrun's job; several ranks: integration/test_launch.py."""

from __future__ import annotations

import json

import pytest

from muxtune.errors import RunError, SpecError, UserError
from runtime import join
from runtime.join import joined, share, together
from runtime.peers import PeerLostError


def _refuse() -> None:
    raise SpecError("steps", 6, "1 to 5")


def test_a_rank_alone_agrees_with_itself():
    assert together(lambda: 3) == 3
    assert share("a") == ["a"]
    with pytest.raises(SpecError, match="steps = 6"):
        together(_refuse)


@pytest.mark.parametrize(
    ("error", "kind"), [(SpecError("steps", 6, "1 to 5"), UserError), (RunError("x"), RunError)]
)
def test_an_error_names_the_rank_and_stays_of_its_kind(error, kind):
    with pytest.raises(kind, match=f"^rank 3: {error}$"), joined(3, 1, 60):
        raise error


def test_a_lost_peer_is_told_to_torchrun_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(join, "END_WAIT_S", 0.0)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(PeerLostError), joined(0, 1, 60):
        raise PeerLostError("the connection to rank 1 broke:\nclosed")
    told = json.loads((tmp_path / "error.json").read_text())
    assert told["message"] == "rank 0 ended: the connection to rank 1 broke: closed"


def test_a_lost_peer_is_an_error_where_no_torchrun_listens(monkeypatch):
    monkeypatch.setattr(join, "END_WAIT_S", 0.0)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    with (
        pytest.raises(RunError, match=r"^rank 0: the connection to rank 1 broke$") as caught,
        joined(0, 1, 60),
    ):
        raise PeerLostError("the connection to rank 1 broke")
    assert not isinstance(caught.value, PeerLostError)
