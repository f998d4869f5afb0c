"""Runs a sampler table inside diffusers: `TableScheduler.from_file("3.json")` is a scheduler of its pipelines.

This file needs torch, NumPy and diffusers and nothing of this project, which in turn never imports it: it can be copied
to where a table is used. A table is what `SamplerTable.to_json` writes and learn.py leaves in tables/.
"""

from __future__ import annotations  # so that the site is built without torch

import json
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

PREDICTIONS = {
    "epsilon": lambda a, n: (0.0, 1.0),
    "sample": lambda a, n: (1.0, 0.0),
    "v_prediction": lambda a, n: (-n, a),
    "flow_prediction": lambda a, n: (-1.0, 1.0),
}
"""What a network predicts, as the weights of x_0 and of the noise at signal a and noise n."""

CLIPS = ("none", "recompute", "keep_eps")


class TableScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler that makes the network calls of a sampler table.

    Stage i computes D, the estimate of x_0 from register 0, and R' = update[i] @ [R, D, z] with fresh noise z.

    Args:
      table: the table's JSON.
      prediction_type: what the network predicts, a key of PREDICTIONS.
      clip: what happens to an estimate of x_0 outside [-1, 1]: none; recompute, as in DDPM; keep_eps, as in DDIM.
      time_shift: what is added to the table's times, which count from 1; 0 for networks of a flow's times.
    """

    order = 1

    @register_to_config
    def __init__(
        self, table: str, prediction_type: str = "epsilon", clip: str = "none", time_shift: float = -1.0
    ) -> None:
        fields = json.loads(table)
        if prediction_type not in PREDICTIONS or clip not in CLIPS:
            raise ValueError(f"prediction_type is {prediction_type!r} and clip {clip!r}; see PREDICTIONS and CLIPS")
        self.signal, self.noise, self.update = (np.asarray(fields[name]) for name in ("signal", "noise", "update"))
        self.log_variance = fields["log_variance"]
        times = np.asarray(fields["t"]) + time_shift
        self._times = times.astype(np.int64 if np.all(times == np.round(times)) else np.float32)
        usual = [np.hypot(self.signal[0], self.noise[0])]
        self._start = np.asarray(fields.get("start", usual))  # only tables with an analytic first step have one
        self.init_noise_sigma = float(self._start[0])
        self.set_timesteps()

    @classmethod
    def from_file(cls, path: str | os.PathLike, **options) -> "TableScheduler":
        """Makes a scheduler of the table in a file; options are those of the class."""
        return cls(Path(path).read_text(), **options)

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None) -> None:
        """Starts anew; the number of steps can only be the table's.

        Raises:
          ValueError: it is another.
        """
        calls = len(self._times)
        if num_inference_steps not in (None, calls):
            raise ValueError(f"this table makes {calls} network calls; give num_inference_steps={calls}")
        self.num_inference_steps, self.timesteps = calls, torch.from_numpy(self._times).to(device)
        self._stage, self._registers = 0, []

    def __len__(self) -> int:
        """Counts the network calls."""
        return len(self._times)

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """Returns the sample as it is."""
        return sample

    def step(
        self, model_output: torch.Tensor, timestep, sample: torch.Tensor, generator=None, return_dict: bool = True, **_
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """Makes the next stage of the table, whatever the timestep; set_timesteps begins with the first.

        Args:
          model_output: the prediction, and with it the variance where there are twice the channels.
          timestep: of this call.
          sample: what the network saw.
          generator: of the noise.
          return_dict: whether to return a SchedulerOutput or a tuple.

        Raises:
          ValueError: the table is at its end, or learns its variance from a network that predicts none.
        """
        if self._stage == len(self):
            raise ValueError("the table is at its end; call set_timesteps before the next samples")
        stage, channels = self._stage, sample.shape[1]
        output, share = model_output[:, :channels], model_output[:, channels:]
        estimate, seen = self._estimate(output, sample, stage)
        rows = self.update[stage]
        if stage == 0:  # multiples of the noise that the network sees first, or empty
            shares = np.pad(self._start / self._start[0], (0, len(rows) - len(self._start)))
            self._registers = [share * sample for share in shares[1:].tolist()]
        columns = [seen, *self._registers, estimate]
        if np.any(rows[:, -1]):
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            columns.append(noise if self.log_variance is None else self._spread(share, stage) * noise)
        weighed = [sum(w * c for w, c in zip(row.tolist(), columns, strict=False)) for row in rows]
        self._registers, self._stage = weighed[1:], stage + 1
        return SchedulerOutput(prev_sample=weighed[0]) if return_dict else (weighed[0],)

    def _estimate(self, output, sample, stage):
        """Returns the estimate of x_0, and the sample as clipping moves it."""
        a, n = float(self.signal[stage]), float(self.noise[stage])
        c, e = PREDICTIONS[self.config.prediction_type](a, n)
        estimate = output / c if e == 0 else (e * sample - n * output) / (e * a - n * c)
        if self.config.clip == "none":
            return estimate, sample
        clipped = estimate.clamp(-1, 1)
        return clipped, sample + a * (clipped - estimate) if self.config.clip == "keep_eps" else sample

    def _spread(self, share, stage):
        """Returns the standard deviation that a network says, between the smallest and the largest."""
        if not share.shape[1]:
            raise ValueError("this table takes its variance from the network, which predicts none")
        small, large = self.log_variance[stage]
        between = (share + 1) / 2
        return torch.exp(0.5 * (between * large + (1 - between) * small))
