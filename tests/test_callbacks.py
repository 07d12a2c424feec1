import re
from pathlib import Path

from tests.runs import make_trainer
from training.checkpoints import newest_checkpoint


def test_the_bar_tells_loss_recall_and_speed_and_starts_where_the_run_stands(run_config: Path, capfd):
    make_trainer(run_config).train()
    shown = capfd.readouterr().err
    assert re.search(r"10/10 \[.*loss=\d\.\d{3}, R@1=\d+\.\d/\d+\.\d, samples/s=\d+\]", shown)
    longer = make_trainer(run_config, "trainer.epochs=3")
    longer.train(resume_from_checkpoint=newest_checkpoint(longer.args.output_dir))
    shown = capfd.readouterr().err
    assert " 67%" in shown.split("15/15")[0].split("\r")[1]
    assert not re.search(r"\b[1-9]/15", shown)


def test_without_bars_a_log_is_a_line(run_config: Path, capfd):
    make_trainer(run_config, "trainer.disable_tqdm=true").train()
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 12  # ten steps, two evaluations
    assert re.fullmatch(r"step 1/10  train/epoch 0\.2  train/loss \S+  train/loss_clip \S+  train/loss_mrl \S+  train/lr \S+", lines[0])  # fmt: skip  # noqa: E501
    assert re.fullmatch(r"step 5/10  train/epoch 1  val/loss \S+  val/i2t_r1 \S+  val/t2i_r1 \S+", lines[5])
