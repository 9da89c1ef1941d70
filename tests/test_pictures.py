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
    page.write_text("<!-- = shapes-adello-reversed-imb50 accuracy -->55.1<!-- / -->\n<!-- table longer -->\n<!-- end -->")
    found = pictures.pages(write=True)
    assert len(found) == 2 and "accuracy is 55.0, not 55.1" in found[1]
    assert "| adello | 55.0 ± 7.1, 10.0 ± 0.0 | – |" in page.read_text() and pictures.pages(write=False) == []


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
