"""Random settings: each either trains two steps to finite numbers or ends in one line."""

import pytest

from soak import check


@pytest.mark.parametrize("block", range(2))
def test_random_settings_train_or_end_in_one_line(block, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = [check(seed, image_folder, tmp_path) for seed in range(12 * block, 12 * block + 12)]
    assert "trained" in seen and "refused" in seen
