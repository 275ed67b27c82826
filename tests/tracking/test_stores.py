"""The tracking store by its address; servers are real ones."""

from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from servers import mlflow_server

from sparse_ft.errors import UserError
from sparse_ft.tracking.runs import Tracker


@pytest.mark.slow
def test_a_server_that_is_called_by_name_must_be_told_so(tmp_path):
    """MLflow's guard against DNS rebinding lets localhost and private addresses in, and no other name."""
    options = ["--allowed-hosts", "gpu.example.org:5000", "--cors-allowed-origins", "http://gpu.example.org:5000"]
    with mlflow_server(tmp_path, f"sqlite:///{tmp_path}/mlflow.db", *options) as address:
        with pytest.raises(UserError, match=f"--allowed-hosts {urlsplit(address).netloc}, or call it by its address"):
            Tracker(address)
        search = f"{address}/ajax-api/2.0/mlflow/experiments/search"
        for origin, allowed in (("http://gpu.example.org:5000", True), ("http://elsewhere.example.org", False)):
            headers = {"Host": "gpu.example.org:5000", "Origin": origin, "Content-Type": "application/json"}
            asked = Request(search, data=b'{"max_results": 1}', headers=headers, method="POST")
            if allowed:
                assert b"Default" in urlopen(asked).read()
            else:
                with pytest.raises(HTTPError, match="403"):
                    urlopen(asked)
