"""Which photos and which results a run is of: `data.dvc` and `dvc.lock`, kept and committed."""

from pathlib import Path

from flows.reports.report import RunReport
from tasks.layout import Layout
from tasks.services.git_branch import Branch


def recorded_version(path: Path) -> str:
    """First digits of the version in `data.dvc`, read without loading DVC."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [line.partition("md5:")[2].strip() for line in lines if "md5:" in line]
    return found[0][:8] if found else "none"


def version_files(layout: Layout) -> list[Path]:
    """The files that name the version of the photos and of everything made of them."""
    return [layout.data_file, layout.lock]


def commit_versions(layout: Layout, branch: str, report: RunReport) -> str:
    """Commit them on a branch of `origin`, if they are not there already.

    Args:
        layout: the checkout; its own branch, index and files stay as they are.
        branch: name of the branch.
        report: of the run so far, for the message.

    Returns:
        What was done, in words for the log.

    Raises:
        ServiceError: git or the remote refuses.
    """
    accuracy = report.test.accuracy or 0.0
    verdict = "passed" if report.gate.passed else "refused"
    commit = Branch(layout.root, branch).commit(
        version_files(layout),
        f"Retrain on data {report.data.version[:8]}\n\n"
        f"Test accuracy {accuracy:.1%}; the gate {verdict} the model.",
    )
    return f"commit {commit} is pushed" if commit else "it holds these versions already"
