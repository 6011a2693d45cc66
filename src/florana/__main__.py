"""`python -m florana` is `florana`."""

from florana.cli.main import main

if __name__ == "__main__":
    main()
