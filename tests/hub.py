"""A Hugging Face cache in a folder: what is needed of the hub where there is no network."""

import shutil

SHA = "0123456789abcdef0123456789abcdef01234567"


def put(home, repo_id, source, sha=SHA):
    """Put `source` into the cache that HF_HOME=home names, as the main branch of a repository."""
    folder = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(sha)
    shutil.copytree(source, folder / "snapshots" / sha)
