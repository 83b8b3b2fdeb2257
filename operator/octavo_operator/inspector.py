"""How a pass learns the geometry of its model: stated, read from here, remembered, or read by a Job in the cluster."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from octavo_operator.api import InferenceServiceSpec
from octavo_operator.apiserver import JOB, POD, ApiServer
from octavo_operator.children import Owner
from octavo_operator.errors import ApiError
from octavo_operator.fit import model_address
from octavo_operator.inspection import INSPECTION_LABEL, inspection_job, needs_inspection, read_inspection
from octavo_operator.modelgeometry import GeometryReader, stated_geometry, with_refusal
from octavo_operator.observe import Key, Manifest, ModelGeometry
from octavo_operator.render import remembered_geometry

logger = logging.getLogger(__name__)

# While a Job runs it is asked for, since nobody watches Jobs; a pod takes seconds to start.
_POLL_S = 3.0
# A Job that failed stays for minutes, and what it said with it.
_LOOK_AGAIN_S = 60.0


class ModelReader:
    """Of one operator."""

    def __init__(self, reader: GeometryReader, inspector: "Inspector") -> None:
        self._reader = reader
        self._inspector = inspector

    async def read(
        self, owner: Owner, spec: InferenceServiceSpec, config_maps: Sequence[Manifest]
    ) -> tuple[ModelGeometry, float | None]:
        """The geometry, or why it is not known; and seconds after which it is worth asking again.

        config_maps: of the engines that run, which remember what they were planned with
        Raises ApiError, and `apiserver.UNREACHABLE`, where a Job is needed and the API server does not answer.
        """
        address = model_address(spec)
        model = stated_geometry(spec) or await self._reader.read(address)
        if model.geometry is not None or model.is_unsupported:
            return model, None
        remembered = remembered_geometry(config_maps, address)
        if remembered is not None:
            return replace(model, geometry=remembered), self._reader.retry_after_s(address)
        if not needs_inspection(spec, model):
            return with_refusal(model, spec), self._reader.retry_after_s(address)
        found = await self._inspector.inspect(owner, spec)
        if found is None:
            return ModelGeometry(problem=f"a Job reads {address} in the cluster", reason="Inspecting"), _POLL_S
        return found, None if found.geometry else _LOOK_AGAIN_S


class Inspector:
    """Starts inspection Jobs. Answers are kept, since their Jobs are not."""

    def __init__(self, api: ApiServer, engine_image: str) -> None:
        self._api = api
        self._engine_image = engine_image
        self._known: dict[Key, ModelGeometry] = {}

    async def inspect(self, owner: Owner, spec: InferenceServiceSpec) -> ModelGeometry | None:
        """What a Job says of the model; None while it runs. The first call starts it.

        Raises ApiError, and `apiserver.UNREACHABLE`, where the API server does not answer.
        """
        image = (spec.engine.image if spec.engine else None) or self._engine_image
        job = inspection_job(owner, spec, image)
        key = Key(owner.key.namespace, job["metadata"]["name"])
        if key in self._known:
            return self._known[key]
        try:
            live = await self._api.get(JOB, key)
            if live is None:
                await self._api.apply(job)
                logger.info("resource=%s job=%s inspects %s", owner.key, key.name, spec.model.uri)
                return None
        except ApiError as error:
            if error.status != 403 and not error.is_final:
                raise
            return ModelGeometry(problem=f"the model cannot be inspected: {error}", reason="InspectionFailed")
        pods, _ = await self._api.list(POD, key.namespace, f"{INSPECTION_LABEL}={key.name}")
        found = read_inspection(live, pods)
        if found is not None and found.geometry is not None:
            self._known[key] = found
        return found
