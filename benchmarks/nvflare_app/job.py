"""NVFlare's FedAvg by its recipe, a process for each site: ``python job.py SITES ROUNDS FOLDER``."""

import sys
from pathlib import Path

from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe.sim_env import SimEnv
from weights import Weights

sites, rounds, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
recipe = FedAvgRecipe(
    name="fedavg",
    model=Weights(),
    min_clients=sites,
    num_rounds=rounds,
    train_script=str(Path(__file__).with_name("site.py")),
    train_args=f"--out {folder}",
)
recipe.execute(SimEnv(num_clients=sites, num_threads=sites, workspace_root=str(folder / "workspace")))
