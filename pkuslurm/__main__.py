"""python -m pkuslurm VERB …"""

import sys

from pkuslurm.cli import main

sys.exit(main())
