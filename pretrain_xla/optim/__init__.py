"""The optimizer and the learning rate; all of it runs inside the compiled step, on device tensors only.

Read `optimizer.py` first: `make_optimizer` sorts the parameters by the table in `parameters.py` into rules, `AdamW`
(`adamw.py`) and `Muon` (`muon.py`, `newton_schulz.py`). Then `clipping.py` (global norm), `schedules.py` (learning rate as a
function of the step) and `averaging.py` (mean of the weights). The step uses four things of an optimizer: `names`,
`parameters`, `state` and `update`; `run_folder/build.py` creates it.
"""

from pretrain_xla.optim.matrices import MapMatrices
from pretrain_xla.optim.optimizer import Optimizer, make_optimizer
from pretrain_xla.optim.schedules import learning_rate

__all__ = ["MapMatrices", "Optimizer", "learning_rate", "make_optimizer"]
