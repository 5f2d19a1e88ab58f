"""`python -m tasks STAGE [ITEM]` runs a stage."""

from tasks.stage import main

main()
