"""A profile survives its file, and everything that is not a profile is refused in one line."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from muxtune.costs import ProfiledCosts, load_profile, save_profile
from muxtune.costs.needs import PLAIN_KINDS
from muxtune.costs.profile import Addition, Measurement, Overlap, Overlaps, Profile, load_provenance
from muxtune.graph.attention_backends import AttentionContest, AttentionTime
from muxtune.graph.operators import Operator
from muxtune.support.errors import UserError
from tests.muxtune.costs.synthetic import analytic_law, make_profile, operators


@pytest.fixture
def profile():
    return make_profile(analytic_law(), [*operators(), Operator("stage", (3, 2, 8, 1, 64))][::5])


def test_round_trip_keeps_everything(profile, tmp_path):
    save_profile(profile, tmp_path / "p.parquet")
    loaded = load_profile(tmp_path / "p.parquet")
    assert loaded == profile
    assert loaded.ref == profile.ref
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]


def test_overlaps_are_kept_and_belong_to_the_content(profile, tmp_path):
    rounds = tuple(
        Overlap(tokens=tokens, calls=2, compute_s=2e-3, communication_s=1e-3, both_s=both_s)
        for tokens, both_s in ((64, 2.5e-3), (256, 2.2e-3), (1024, 4.1e-3), (64, 1.9e-3))
    )
    assert [each.contention for each in rounds] == pytest.approx([0.5, 0.2, 2.1, 0.0])
    measured = replace(profile, overlaps=Overlaps(ranks=2, rounds=rounds))
    save_profile(measured, tmp_path / "p.parquet")
    assert load_profile(tmp_path / "p.parquet") == measured
    assert measured.digest != profile.digest
    assert ProfiledCosts(measured, profile.model).contention == pytest.approx(
        0.675
    )  # of all seconds together
    assert ProfiledCosts(measured, profile.model).shard(2).contention == pytest.approx(
        0.675
    )  # of all seconds together
    assert ProfiledCosts(profile, profile.model).contention is None


def test_senseless_overlaps_are_refused(profile, tmp_path):
    def edit(table):
        overlaps = b'{"ranks": 1, "rounds": []}'
        return table.replace_schema_metadata(table.schema.metadata | {b"muxtune.overlaps": overlaps})

    _refused(_edited(profile, tmp_path, edit), "p.parquet: overlaps: ranks = 1: expected greater than 1")


def test_table_is_readable_without_us(profile, tmp_path):
    save_profile(profile, tmp_path / "p.parquet")
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    linear = next(row for row in rows if row["kind"] == "linear")
    assert linear["dims"] == f"in_features={linear['d0']},out_features={linear['d1']},tokens={linear['d2']}"
    assert (linear["d3"], linear["d4"]) == (None, None)
    assert {row["dtype"] for row in rows} == {"float32"}


def test_digest_follows_the_content(profile):
    law = analytic_law()
    slower = make_profile(lambda op, phase: 1.001 * law(op, phase), [m.op for m in profile.measurements])
    assert slower.digest != profile.digest
    plain = profile.of_kinds(PLAIN_KINDS)
    assert profile.profile_id == plain.profile_id == f"cpu-llama-tiny-float32-{plain.digest[:12]}"
    assert plain.digest != profile.digest  # which has dropout, too


def test_the_choice_of_attention_survives_and_is_part_of_the_identity(profile, tmp_path):
    contest = AttentionContest(
        streams=((8, 16),),
        times=(
            AttentionTime(backend="grouped", fwd_s=(0.2,), bwd_s=(0.4,)),
            AttentionTime(backend="loop", fwd_s=(0.1,), bwd_s=(0.3,)),
        ),
        chosen="loop",
    )
    chosen = replace(profile, provenance=profile.provenance.model_copy(update={"attention": contest}))
    save_profile(chosen, tmp_path / "p.parquet")
    assert load_profile(tmp_path / "p.parquet") == chosen
    assert (profile.attention, chosen.attention) == ("grouped", "loop")
    assert chosen.digest != profile.digest
    costs = ProfiledCosts(chosen, chosen.model)
    assert costs.attention == costs.shard(2).attention == "loop"


def _refused(path, match):
    with pytest.raises(UserError, match=match) as caught:
        load_profile(path)
    assert "\n" not in str(caught.value)


def test_missing_file_is_refused(tmp_path):
    _refused(tmp_path / "absent.parquet", "cannot read the profile .*absent.parquet")


@pytest.mark.parametrize("kept", [0, 7, 3000])
def test_truncated_file_is_refused(profile, tmp_path, kept):
    path = tmp_path / "p.parquet"
    save_profile(profile, path)
    path.write_bytes(path.read_bytes()[:kept])
    _refused(path, "p.parquet is not a whole Parquet file")


def test_someone_elses_parquet_is_refused(tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "p.parquet")
    _refused(tmp_path / "p.parquet", "not a profile of ours")


def _edited(profile, tmp_path, edit):
    path = tmp_path / "p.parquet"
    save_profile(profile, path)
    pq.write_table(edit(pq.read_table(path)), path)
    return path


def test_missing_columns_are_named(profile, tmp_path):
    path = _edited(profile, tmp_path, lambda table: table.drop_columns(["p90_s", "d1"]))
    _refused(path, "expected the columns d1, p90_s, which are missing")


@pytest.mark.parametrize(
    ("column", "value", "match"),
    [
        ("kind", "matmul", "row 0: kind = 'matmul': expected one of linear"),
        ("phase", "both", "row 0: phase = 'both': expected fwd or bwd"),
        ("d0", None, "row 0: dims = .*: expected in_features"),
        ("d0", -256, r"row 0: dims = \(-256, .*: expected in_features, out_features, tokens, none below 1"),
        ("median_s", 0.0, "row 0: median_s = 0.0: expected seconds above 0"),
        ("median_s", -1e-3, "row 0: median_s = -0.001: expected seconds above 0"),
        ("median_s", None, "row 0: median_s = None: expected seconds above 0"),
        ("median_s", float("nan"), "row 0: median_s = nan: expected seconds above 0"),
        ("median_s", float("inf"), "row 0: median_s = inf: expected seconds above 0, and at most 1000000000"),
        ("median_s", 1e308, r"row 0: median_s = 1e\+308: expected seconds above 0, and at most 1000000000"),
        ("p90_s", float("nan"), "row 0: p90_s = nan: expected seconds above 0"),
        ("repetitions", 0, "row 0: repetitions = 0: expected at least 1"),
    ],
)
def test_senseless_rows_are_named(profile, tmp_path, column, value, match):
    def edit(table):
        values = [value, *table[column].to_pylist()[1:]]
        index = table.column_names.index(column)
        return table.set_column(index, column, pa.array(values, table.schema.field(column).type))

    _refused(_edited(profile, tmp_path, edit), match)


def test_a_place_that_cannot_be_written_is_refused(profile, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the profile"):
        save_profile(profile, tmp_path / "file" / "p.parquet")


def test_a_profile_from_before_clocks_and_notes_were_recorded_still_loads(profile, tmp_path):
    def without_the_new_fields(table):
        key = b"muxtune.profile"
        provenance = json.loads(table.schema.metadata[key])
        for field in ("backend", "settings", "clocks", "notes"):
            del provenance[field]
        return table.replace_schema_metadata({key: json.dumps(provenance).encode()})

    loaded = load_profile(_edited(profile, tmp_path, without_the_new_fields))
    assert loaded == profile
    assert (loaded.provenance.backend, loaded.provenance.notes) == (None, ())


def test_a_part_of_a_profile_is_the_same_whatever_came_to_it(profile):
    """Its measurements, identity and notes: those of later sessions count where their kinds do."""
    early, late = (
        Addition(created_utc="2025-01-02T00:00:00+00:00", kinds=(kind,), notes=(f"note on {kind}",))
        for kind in ("dropout", "ia3")
    )
    ia3 = Measurement(Operator("ia3", (256, 256, 16)), "fwd", 1e-3, 1e-3, 1e-3, 5)
    grown = Profile(
        (*profile.measurements, ia3),
        profile.provenance.model_copy(update={"notes": ("first",), "additions": (early, late)}),
    )
    plain = grown.of_kinds(PLAIN_KINDS)
    assert plain.kinds == profile.kinds - {"dropout"}
    assert plain.digest == profile.of_kinds(PLAIN_KINDS).digest
    assert plain.notes == ("first",)
    dropped = grown.of_kinds(PLAIN_KINDS | {"dropout"})
    assert dropped.digest == profile.digest != plain.digest
    assert dropped.notes == ("first", "note on dropout")
    assert grown.of_kinds(PLAIN_KINDS | {"dropout", "ia3"}) is grown
    assert grown.notes == ("first", "note on dropout", "note on ia3")
    assert grown.profile_id == plain.profile_id == dropped.profile_id


def test_provenance_is_read_without_the_measurements(profile, tmp_path):
    path = tmp_path / "p.parquet"
    save_profile(profile, path)
    assert load_provenance(path) == profile.provenance
    path.write_text("none")
    assert load_provenance(path) is None
    assert load_provenance(tmp_path / "nothing") is None
