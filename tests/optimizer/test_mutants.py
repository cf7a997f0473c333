"""mutants.py goes with the sources and the tests. It is run by hand: see docs/internals.md."""

import ast

from tests.optimizer import mutants


def test_every_mutant_changes_one_place_and_names_its_tests() -> None:
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS)
    for mutant in mutants.MUTANTS:
        ast.parse(mutants.check(mutant).replace(mutant.old, mutant.new))
        for test in mutant.tests.split():
            file, _, name = test.partition("::")
            assert f"\ndef {name}(" in (mutants.HERE / file).read_text(), mutant.name
