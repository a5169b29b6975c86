//! The mapper's half of the interface: what EdgeCore calls.
//!
//! Every call becomes an [`Input`] for the core; a call is answered once the input is queued, so an
//! EdgeCore is never kept waiting for a device. Removing what is not there is done already.

use skerry_dmi::v1beta1 as dmi;
use skerry_dmi::v1beta1::device_mapper_service_server::DeviceMapperService;
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status};

use crate::core::{Counts, Input};
use crate::device::DeviceId;

/// A question to whoever owns the core.
#[derive(Debug)]
pub(crate) enum Question {
    /// What is known of a device.
    Device(DeviceId, oneshot::Sender<Option<dmi::Device>>),
    /// The numbers for metrics.
    Counts(oneshot::Sender<Counts>),
}

/// Serves EdgeCore.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    pub(crate) inputs: mpsc::Sender<Input>,
    pub(crate) questions: mpsc::Sender<Question>,
}

impl Service {
    async fn give(&self, input: Input) -> Result<(), Status> {
        self.inputs.send(input).await.map_err(|_| stopping())
    }
}

fn stopping() -> Status {
    Status::unavailable("the mapper is stopping")
}

fn named(name: &str, what: &str) -> Result<(), Status> {
    if name.is_empty() {
        return Err(Status::invalid_argument(format!("{what} has no name")));
    }
    Ok(())
}

fn device(device: Option<dmi::Device>) -> Result<dmi::Device, Status> {
    let device = device.ok_or_else(|| Status::invalid_argument("the device is missing"))?;
    named(&device.name, "the device")?;
    Ok(device)
}

fn model(model: Option<dmi::DeviceModel>) -> Result<dmi::DeviceModel, Status> {
    let model = model.ok_or_else(|| Status::invalid_argument("the model is missing"))?;
    named(&model.name, "the model")?;
    Ok(model)
}

#[tonic::async_trait]
impl DeviceMapperService for Service {
    async fn register_device(
        &self,
        request: Request<dmi::RegisterDeviceRequest>,
    ) -> Result<Response<dmi::RegisterDeviceResponse>, Status> {
        let device = device(request.into_inner().device)?;
        let answer = dmi::RegisterDeviceResponse {
            device_name: device.name.clone(),
            device_namespace: device.namespace.clone(),
        };
        self.give(Input::PutDevice(device)).await?;
        Ok(Response::new(answer))
    }

    async fn remove_device(
        &self,
        request: Request<dmi::RemoveDeviceRequest>,
    ) -> Result<Response<dmi::RemoveDeviceResponse>, Status> {
        let request = request.into_inner();
        named(&request.device_name, "the device")?;
        let id = DeviceId::new(&request.device_namespace, &request.device_name);
        self.give(Input::RemoveDevice(id)).await?;
        Ok(Response::new(dmi::RemoveDeviceResponse {}))
    }

    async fn update_device(
        &self,
        request: Request<dmi::UpdateDeviceRequest>,
    ) -> Result<Response<dmi::UpdateDeviceResponse>, Status> {
        self.give(Input::PutDevice(device(request.into_inner().device)?)).await?;
        Ok(Response::new(dmi::UpdateDeviceResponse {}))
    }

    async fn create_device_model(
        &self,
        request: Request<dmi::CreateDeviceModelRequest>,
    ) -> Result<Response<dmi::CreateDeviceModelResponse>, Status> {
        let model = model(request.into_inner().model)?;
        let answer = dmi::CreateDeviceModelResponse {
            device_model_name: model.name.clone(),
            device_model_namespace: model.namespace.clone(),
        };
        self.give(Input::PutModel(model)).await?;
        Ok(Response::new(answer))
    }

    async fn remove_device_model(
        &self,
        request: Request<dmi::RemoveDeviceModelRequest>,
    ) -> Result<Response<dmi::RemoveDeviceModelResponse>, Status> {
        let request = request.into_inner();
        let id = DeviceId::new(&request.model_namespace, &request.model_name);
        self.give(Input::RemoveModel(id)).await?;
        Ok(Response::new(dmi::RemoveDeviceModelResponse {}))
    }

    async fn update_device_model(
        &self,
        request: Request<dmi::UpdateDeviceModelRequest>,
    ) -> Result<Response<dmi::UpdateDeviceModelResponse>, Status> {
        self.give(Input::PutModel(model(request.into_inner().model)?)).await?;
        Ok(Response::new(dmi::UpdateDeviceModelResponse {}))
    }

    async fn get_device(
        &self,
        request: Request<dmi::GetDeviceRequest>,
    ) -> Result<Response<dmi::GetDeviceResponse>, Status> {
        let request = request.into_inner();
        let id = DeviceId::new(&request.device_namespace, &request.device_name);
        let (answer, answered) = oneshot::channel();
        let question = Question::Device(id.clone(), answer);
        self.questions.send(question).await.map_err(|_| stopping())?;
        match answered.await.map_err(|_| stopping())? {
            Some(device) => Ok(Response::new(dmi::GetDeviceResponse { device: Some(device) })),
            None => Err(Status::not_found(format!("device `{id}` is not here"))),
        }
    }
}
