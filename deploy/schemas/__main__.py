"""Write the schema files: ``python -m deploy.schemas``."""

from deploy.schemas import schemas

if __name__ == "__main__":
    for path, text in schemas().items():
        path.write_text(text, encoding="utf-8")
