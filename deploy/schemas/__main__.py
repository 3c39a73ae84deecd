"""Write the schema files: ``python -m deploy.schemas``."""

import argparse

from deploy.schemas import schemas

if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m deploy.schemas", description="Write the schema files.").parse_args()
    for path, text in schemas().items():
        path.write_text(text, encoding="utf-8")
