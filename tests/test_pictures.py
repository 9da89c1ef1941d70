"""pictures.py: what the two pages say is what the files of the runs say, and pictures are drawn."""


import pytest

import pictures
from test_evaluate import made_up_run


def test_every_table_and_figure_of_the_pages_is_the_files():
    assert pictures.pages(write=False) == []


def test_a_figure_that_the_files_do_not_have_is_found(tmp_path, monkeypatch):
    for i, accuracy in enumerate((0.5, 0.6)):
        made_up_run(tmp_path / f"results/shapes-adello-reversed-imb50-s{i}", seed=i, accuracy=accuracy)
    page = tmp_path / "page.md"
    monkeypatch.setattr(pictures, "ROOT", tmp_path)
    monkeypatch.setattr(pictures, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(pictures, "PAGES", [page])
    page.write_text("<!-- = shapes-adello-reversed-imb50 accuracy -->55.0<!-- / -->")
    assert pictures.pages(write=False) == []
    page.write_text("<!-- = shapes-adello-reversed-imb50 accuracy -->55.1<!-- / -->\n"
                    "<!-- table longer -->\n<!-- end -->")
    found = pictures.pages(write=True)
    assert len(found) == 2 and "accuracy is 55.0, not 55.1" in found[1]
    assert "| adello | 55.0 ± 7.1, 10.0 ± 0.0 | – |" in page.read_text() and pictures.pages(write=False) == []


def test_a_figure_of_runs_that_are_not_there_is_an_error_that_names_them(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    monkeypatch.setattr(pictures, "PAGES", [page])
    for absent in ("shapes-absent-imb50", "shapes-adello-reversed-imb50/shapes-absent-imb50", "shapes-absent@100"):
        page.write_text(f"<!-- = {absent} accuracy -->55.0<!-- / -->")
        assert pictures.main(["--check"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: no run") and absent in error and error.count("\n") == 1


def test_a_figure_without_a_file_is_found():
    text = ("arXiv 2306.04621: FixMatch ends at 54.3, ADELLO 2 points above, in 4 of 5 pairs,\n"
            "<!-- = x ece -->4.8<!-- / -->\n"
            "`--imb-u 0.1`\n<!-- table x -->\n| 1.5 |\n<!-- end -->\n| published | 30.2 |\nover 5 seeds, 1,500 steps")
    assert pictures.unmarked(text) == ["54.3", "2 points", "4 of 5"]


def test_pairs_have_the_same_shift_and_seed_and_a_lower_ece_wins(tmp_path, monkeypatch):
    for method, shift, seed, accuracy, ece in [("a", "reversed", 0, 0.60, 0.10), ("a", "uniform", 0, 0.70, 0.20),
                                               ("a", "uniform", 1, 0.90, 0.90), ("b", "uniform", 0, 0.61, 0.21),
                                               ("b", "reversed", 0, 0.58, 0.13)]:
        made_up_run(tmp_path / f"{method}-{shift}-s{seed}", method=method, shift=shift, seed=seed, accuracy=accuracy,
                    ece=ece)
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    assert pictures.figure_of("a-*/b-*", "accuracy") == "+5.5" and pictures.figure_of("a-*/b-*", "ece") == "-2.0"
    assert pictures.figure_of("a-uniform/b-uniform", "ece-wins") == "1 of 1"
    assert pictures.figure_of("b-*/a-*", "accuracy-wins") == pictures.figure_of("b-*/a-*", "ece-wins") == "0 of 2"


@pytest.mark.parametrize("kind", ["reliability", "fig3", "sweep"])
def test_pictures_are_drawn(kind, tmp_path):
    pytest.importorskip("matplotlib")
    runs = [str(made_up_run(tmp_path / f"shapes-{m}-u{g}-s0", imb_u=g, method=m)) for g in (10.0, 0.1)
            for m in ("adello", "fixmatch")]
    assert pictures.main([kind, str(tmp_path / "x.png"), *runs]) == 0
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "x.png").stat().st_size > 10_000


def test_a_missing_package_or_run_is_one_line(tmp_path, monkeypatch, capsys):
    assert pictures.main(["fig3", "x.png", str(tmp_path)]) == 2 and capsys.readouterr().err.count("\n") == 1
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    run = str(made_up_run(tmp_path / "shapes-adello-s0"))
    assert pictures.main(["fig3", str(tmp_path / "x.png"), run]) == 2
    assert capsys.readouterr().err == "error: pictures need matplotlib: pip install matplotlib\n"
