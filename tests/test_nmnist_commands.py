"""The commands that convert and draw recordings."""

import numpy as np

from tests.nmnist_forms import run, write_raw
from utils import convert_nmnist, preview_nmnist


def test_commands_refuse_with_a_sentence(tmp_path, capsys):
    raw = write_raw(tmp_path / "raw")
    text = tmp_path / "text"
    assert run(convert_nmnist.main, "--path", raw, "--out", text) == 0
    (tmp_path / "file").write_text("")
    for main, arguments, part in ((convert_nmnist.main, ("--path", tmp_path / "no" / "thing", "--out", text), "468j46mzdv"),
                                  (convert_nmnist.main, ("--path", raw, "--out", text), "--out"),
                                  (convert_nmnist.main, ("--path", text, "--out", tmp_path / "new"), "already"),
                                  (convert_nmnist.main, ("--path", raw, "--out", tmp_path / "file"), "--out"),
                                  (preview_nmnist.main, ("--path", raw, "--index", 23, "--out", tmp_path), "--index 23"),
                                  (preview_nmnist.main, ("--path", raw, "--time-step", 5000, "--out", tmp_path), "--time_step"),
                                  (preview_nmnist.main, ("--path", raw, "--out", tmp_path / "file"), "--out"),
                                  (preview_nmnist.main, ("--path", text, "--nmnist-binning", "time", "--out", raw), "binning")):
        capsys.readouterr()
        assert run(main, *arguments) == 2
        err = capsys.readouterr().err
        assert part in err and "Traceback" not in err and err.count("\n") == 1


def test_preview_draws_a_sheet_and_a_film(tmp_path, capsys):
    import cv2
    raw = write_raw(tmp_path / "raw")
    arguments = ("--path", raw, "--split", "Test", "--index", 2, "--time-step", 6, "--out", tmp_path / "out")
    assert run(preview_nmnist.main, *arguments) == 0
    sheet, film = capsys.readouterr().out.split()
    picture = cv2.imread(sheet)
    assert sheet.endswith(".png") and min(picture.shape[:2]) > 200 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 3
    assert cv2.VideoCapture(film).get(cv2.CAP_PROP_FRAME_COUNT) == 6


def test_a_picture_shows_x_to_the_right_and_y_downwards():
    frames = np.zeros((1, 2, 34, 34), bool)
    frames[0, 1, 30, 2] = True
    assert np.argwhere((preview_nmnist.coloured(frames)[0] != 255).any(axis=-1)).tolist() == [[2, 30]]
