"""`redheart …`, killed on the way: python -m tests.faults.dies FILE 2,3 train …  dies by SIGKILL before step 2 of its first start, before
step 3 of its second, and never again; FILE counts the starts. Of several ranks the last one dies."""

import signal
import sys
from pathlib import Path

from redheart.cli import main
from redheart.ranks import launched_rank, launched_world_size
from tests.faults.works import signalled

if __name__ == "__main__":
    file, steps = Path(sys.argv[1]), [int(s) for s in sys.argv[2].split(",")]
    if launched_rank() == launched_world_size() - 1:
        starts = len(file.read_text()) if file.exists() else 0
        file.write_text("." * (starts + 1))
        if starts < len(steps):
            signalled(signal.SIGKILL, steps[starts])
    sys.argv = ["redheart", *sys.argv[3:]]
    main()
