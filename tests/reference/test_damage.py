"""Bits that change inside the reference store: noticed, named and recomputed, or refused; never read."""

import io
import random
import sqlite3
from contextlib import closing

import numpy as np
import pytest
from attacks import flip_a_bit
from oracle import as_policy, random_groups, tiny_llama
from rich.console import Console
from small_runs import QUIET, assert_same_weights

from dpo_fast.errors import UserError
from dpo_fast.reference.scores import Reference
from dpo_fast.reference.store import ReferenceStore, checksum
from dpo_fast.training.run import train

pytestmark = pytest.mark.slow

PACKS = [list(range(start, start + 5)) for start in range(0, 40, 5)]


@pytest.fixture(scope="module")
def policy():
    return as_policy(tiny_llama())


@pytest.fixture(scope="module")
def groups():
    return random_groups(40)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, policy, groups):
    """Bytes of a filled store, and the values in it."""
    path = tmp_path_factory.mktemp("store") / "reference.sqlite"
    with ReferenceStore(path) as store:
        reference = Reference(store, "model")
        reference.fill(groups, policy.score, packs=PACKS)
        values = reference.lookup(groups)
    assert not path.with_name("reference.sqlite-wal").exists()
    return path.read_bytes(), values


def change_blobs(path, change, *, where="1"):
    """Change values as a disk would: without their checksums."""
    with closing(sqlite3.connect(path)) as connection, connection:
        for key, blob in connection.execute(f"select key, logps from answers where {where}").fetchall():
            connection.execute("update answers set logps = ? where key = ?", (change(blob), key))


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_anywhere_in_the_file_is_refused_or_changes_no_value(tmp_path, whole, policy, groups, seed):
    data, values = whole
    path = tmp_path / "reference.sqlite"
    path.write_bytes(data)
    flip_a_bit(path, random.Random(seed))
    refused, found = "", None
    try:
        with ReferenceStore(path) as store:
            reference = Reference(store, "model")
            reference.fill(groups, policy.score, packs=PACKS)
            found = reference.lookup(groups)
    except UserError as error:
        refused = str(error)
    if found is None:
        assert "--reference_store" in refused
        assert "\n" not in refused
        return
    for ours, theirs in zip(found, values, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            # A row that the index has lost is recomputed in another pack, which rounds differently.
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_every_bit_of_a_value_counts_and_its_pack_is_recomputed_to_the_bit(tmp_path, whole, policy, groups):
    data, values = whole
    path = tmp_path / "reference.sqlite"
    path.write_bytes(data)
    rng = random.Random(0)

    def flip(blob):
        place = rng.randrange(8 * len(blob))
        return (int.from_bytes(blob, "little") ^ (1 << place)).to_bytes(len(blob), "little")

    change_blobs(path, flip)
    with ReferenceStore(path) as store:
        reference = Reference(store, "model")
        assert reference.missing(groups) == reference.damaged(groups) == list(range(40))
        reference.fill(groups, policy.score, packs=PACKS)
        assert reference.damaged(groups) == []
        for ours, theirs in zip(reference.lookup(groups), values, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_damaged_row_is_scored_in_the_pack_it_came_from(tmp_path, whole, policy, groups):
    """In a pack of its own it would round differently."""
    path = tmp_path / "reference.sqlite"
    path.write_bytes(whole[0])
    change_blobs(path, lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]), where="rowid = 14")
    scored, counted = [], []

    def score(batch):
        scored.append(batch.pair_rows)
        return policy.score(batch)

    with ReferenceStore(path) as store:
        Reference(store, "model").fill(groups, score, packs=PACKS, progress=counted.append)
    assert scored == [(5, 6, 7, 8, 9)]
    assert counted == [1]


@pytest.mark.parametrize("value", ["'text'", "12", "1.5", "x'00'"])
def test_a_column_of_another_type_is_damage(tmp_path, whole, groups, value):
    path = tmp_path / "reference.sqlite"
    path.write_bytes(whole[0])
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"update answers set logps = {value} where rowid = 1")
        connection.execute(f"update answers set checksum = {value} where rowid = 5")
    with ReferenceStore(path) as store:
        assert len(Reference(store, "model").damaged(groups)) == 2


def test_a_damaged_value_is_replaced_and_a_whole_one_is_not(tmp_path):
    with ReferenceStore(tmp_path / "reference.sqlite") as store:
        store.put({b"a" * 16: np.float32([-1]), b"b" * 16: np.float32([-2])})
        change_blobs(store.path, lambda blob: b"\0\0\0\0", where=f"key = x'{(b'a' * 16).hex()}'")
        store.put({b"a" * 16: np.float32([-3]), b"b" * 16: np.float32([-3])})
        found = store.get([b"a" * 16, b"b" * 16])
    assert [found[letter * 16].tolist() for letter in (b"a", b"b")] == [[-3], [-2]]


def test_a_store_without_checksums_is_emptied(tmp_path, caplog):
    path = tmp_path / "reference.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("create table answers (key blob primary key not null, logps blob not null)")
        connection.execute("insert into answers values (?, ?)", (b"a" * 16, np.float32([-1]).tobytes()))
        connection.execute(f"pragma application_id = {ReferenceStore.APPLICATION_ID}")
        connection.execute("pragma user_version = 2")
    with ReferenceStore(path) as store:
        assert store.get([b"a" * 16]) == {}
        store.put({b"a" * 16: np.float32([-2])})
    assert "written by an earlier version, without checksums: its scores are recomputed" in caplog.text
    with ReferenceStore(path) as store:
        assert store.get([b"a" * 16])[b"a" * 16].tolist() == [-2]


def said(config):
    """What a run prints, and its result."""
    console = Console(file=io.StringIO(), width=300)
    result = train(config, console=console)
    return console.file.getvalue(), result


def test_runs_name_damaged_rows_and_end_with_the_same_bits(config, tmp_path):
    """A fresh run and a resumed one, which loads no reference while its scores are whole."""
    whole = train(config(save_steps=3), console=QUIET)
    store = tmp_path / "reference.sqlite"
    for changes in ({"output_dir": str(tmp_path / "fresh")}, {"resume": str(tmp_path / "run" / "checkpoint-3")}):
        change_blobs(store, lambda blob: bytes([blob[0] ^ 1]) + blob[1:], where="rowid in (3, 4, 9)")
        output, result = said(config(save_steps=3, **changes))
        assert "the stored scores of 2 rows are damaged and are recomputed (rows " in output
        assert_same_weights(whole.model_dir, result.model_dir)


def reseal(store, change):
    """Change values and checksums, as other software would."""
    with closing(sqlite3.connect(store)) as connection, connection:
        for key, blob in connection.execute("select key, logps from answers").fetchall():
            value = change(np.frombuffer(blob, "<f4").copy()).astype("<f4").tobytes()
            row = (value, checksum(key, value), key)
            connection.execute("update answers set logps = ?, checksum = ? where key = ?", row)


def test_a_resumed_run_compares_the_scores_with_those_that_it_began_with(config, tmp_path):
    train(config(save_steps=3), console=QUIET)
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    reseal(tmp_path / "reference.sqlite", lambda logps: np.nextafter(logps, np.float32(0)))
    output, _ = said(config(save_steps=3, resume=checkpoint))
    assert "14 rows (the first: row 0) have other scores than the run began with. They agree" in output
    reseal(tmp_path / "reference.sqlite", lambda logps: logps - np.float32(0.1))
    with pytest.raises(UserError, match=r"stored reference scores of row \d+ are not the model's"):
        train(config(save_steps=3, resume=checkpoint), console=QUIET)


def test_a_damaged_name_in_its_schema_is_one_line(tmp_path):
    """SQLite repeats the name in its message, which Python then cannot decode."""
    path = tmp_path / "store.sqlite"
    ReferenceStore(path).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("pragma writable_schema = on")
        connection.execute("update sqlite_master set name = cast(x'61f5' as text) where type = 'table'")
    with pytest.raises(UserError, match=r"it is damaged; remove it .*--reference_store"):
        ReferenceStore(path)
