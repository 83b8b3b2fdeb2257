import logging, sys, time
from control_plane import ControlPlane
logging.basicConfig(level=logging.INFO)
import signal
with ControlPlane() as cp:
    print(cp.kubeconfig, flush=True)
    sys.stdin.read()
