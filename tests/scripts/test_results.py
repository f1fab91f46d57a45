"""What is kept of finished experiments gives the same table again, and stands where the page has a place for it."""

import tarfile

import pytest
import results
from results import keep, with_table

from gflowvlm.shared.errors import UserError
from gflowvlm.studies.experiments.results import write_results
from tests.studies.experiments.small_experiment import SMALL, finish, select

PAGE = "# Results\n\n<!-- small -->\nold\n<!-- end of small -->\n\nWhy.\n"


def test_kept_records_give_the_table_again_that_stands_on_the_page(tmp_path):
    docs, runs = tmp_path / "docs", tmp_path / "runs"
    docs.mkdir()
    (docs / "results.md").write_text(PAGE)
    assert keep(SMALL, runs, docs) == 0
    assert (docs / "results.md").read_text() == PAGE
    for trial in select(runs / "small-tiny").trials().chosen[:3]:
        finish(trial, 0.8)
    assert keep(SMALL, runs, docs) == 3

    there = tmp_path / "elsewhere"
    with tarfile.open(docs / "data" / "small-tiny.tar.xz") as packed:
        packed.extractall(there, filter="data")
    kept = list(select(there / "small-tiny").finished())
    assert [trial.name for trial in kept] == ["sub-tb-0", "sub-tb-1", "db-0"]
    page = (docs / "results.md").read_text()
    (tmp_path / "again").mkdir()
    title, _, body = write_results(SMALL, kept, tmp_path / "again").partition("\n")
    assert f"#{title}\n" in page
    assert body in page
    assert "`gflowvlm experiment small`, " in page
    assert "old" not in page
    assert page.endswith("<!-- end of small -->\n\nWhy.\n")
    assert (docs / "results" / "small.png").exists()
    assert (docs / "results" / "small-curves.png").exists()


def test_a_page_without_a_place_for_the_table_is_said():
    with pytest.raises(UserError, match="no <!-- large --> and <!-- end of large -->"):
        with_table(PAGE, "large", "# large\n", 1.0)


def test_an_experiment_that_does_not_exist_is_one_line(capsys):
    assert results.main(["motivatin"]) == 2
    assert "did you mean 'motivating'?" in capsys.readouterr().err
