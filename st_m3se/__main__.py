"""`python -m st_m3se`, which `accelerate launch -m` and `torchrun -m` can start as well."""

from st_m3se.cli import main

if __name__ == "__main__":
    main()
