//! EdgeCore's half of the interface for tests, and the mapper program that talks to it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use skerry_dmi::v1beta1 as dmi;
use skerry_dmi::v1beta1::device_manager_service_server::{
    DeviceManagerService, DeviceManagerServiceServer,
};
use skerry_dmi::v1beta1::device_mapper_service_client::DeviceMapperServiceClient;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

/// Longest wait for a state of the world.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a mapper has told.
#[derive(Default)]
pub(crate) struct Told {
    pub(crate) registrations: Vec<dmi::MapperInfo>,
    /// Newest per device and property: reported, observed desired.
    pub(crate) twins: BTreeMap<(String, String), (String, String)>,
    /// All values in order.
    pub(crate) values: Vec<(String, String, String)>,
    pub(crate) states: Vec<(String, String)>,
    pub(crate) calls: usize,
}

#[derive(Clone, Default)]
struct Service {
    told: Arc<Mutex<Told>>,
    answer: Arc<Mutex<dmi::MapperRegisterResponse>>,
}

#[tonic::async_trait]
impl DeviceManagerService for Service {
    async fn mapper_register(
        &self,
        request: Request<dmi::MapperRegisterRequest>,
    ) -> Result<Response<dmi::MapperRegisterResponse>, Status> {
        let request = request.into_inner();
        let mapper = request.mapper.ok_or_else(|| Status::invalid_argument("no mapper"))?;
        assert!(request.with_data);
        self.told.lock().unwrap().registrations.push(mapper);
        Ok(Response::new(self.answer.lock().unwrap().clone()))
    }

    async fn report_device_status(
        &self,
        request: Request<dmi::ReportDeviceStatusRequest>,
    ) -> Result<Response<dmi::ReportDeviceStatusResponse>, Status> {
        let request = request.into_inner();
        let mut told = self.told.lock().unwrap();
        told.calls += 1;
        for twin in request.reported_device.unwrap_or_default().twins {
            // KubeEdge's EdgeCore ends when one of them is missing.
            let reported = twin.reported.ok_or_else(|| Status::internal("no reported"))?;
            let desired = twin.observed_desired.ok_or_else(|| Status::internal("no desired"))?;
            let name = request.device_name.clone();
            told.values.push((name.clone(), twin.property_name.clone(), reported.value.clone()));
            told.twins.insert((name, twin.property_name), (reported.value, desired.value));
        }
        Ok(Response::new(dmi::ReportDeviceStatusResponse {}))
    }

    async fn report_device_states(
        &self,
        request: Request<dmi::ReportDeviceStatesRequest>,
    ) -> Result<Response<dmi::ReportDeviceStatesResponse>, Status> {
        let request = request.into_inner();
        let mut told = self.told.lock().unwrap();
        told.calls += 1;
        told.states.push((request.device_name, request.state));
        Ok(Response::new(dmi::ReportDeviceStatesResponse {}))
    }
}

/// An EdgeCore and one mapper program, in a directory of their own.
pub(crate) struct World {
    directory: tempfile::TempDir,
    service: Service,
    server: JoinHandle<()>,
    mapper: Option<Child>,
    program: &'static str,
    metrics: u16,
}

impl Drop for World {
    fn drop(&mut self) {
        self.server.abort();
        if let Some(mut mapper) = self.mapper.take() {
            let _ = mapper.kill();
            let _ = mapper.wait();
        }
    }
}

impl World {
    /// Serves as EdgeCore with these devices, and starts the mapper.
    pub(crate) fn start(
        program: &'static str,
        devices: Vec<dmi::Device>,
        model: dmi::DeviceModel,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let service = Service::default();
        *service.answer.lock().unwrap() =
            dmi::MapperRegisterResponse { model_list: vec![model], device_list: devices };
        let server = serve(&service, directory.path());
        let metrics = crate::foreign::free_port();
        let config = json!({
            "grpc_server": {"socket_path": directory.path().join("mapper.sock")},
            "common": {
                "name": "test",
                "version": "v1",
                "api_version": "v1.0.0",
                "protocol": "test",
                "edgecore_sock": directory.path().join("dmi.sock"),
                "reports_per_second": 200,
                "metrics": format!("127.0.0.1:{metrics}"),
            },
        });
        std::fs::write(directory.path().join("config.yaml"), config.to_string()).unwrap();
        let mut world = Self { directory, service, server, mapper: None, program, metrics };
        world.start_mapper();
        world
    }

    pub(crate) fn start_mapper(&mut self) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.directory.path().join("mapper.log"))
            .unwrap();
        let child = Command::new(self.program)
            .arg("--config-file")
            .arg(self.directory.path().join("config.yaml"))
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.mapper = Some(child);
    }

    /// Ends the mapper the hard way.
    pub(crate) fn kill_mapper(&mut self) {
        let mut mapper = self.mapper.take().expect("the mapper runs");
        mapper.kill().unwrap();
        mapper.wait().unwrap();
    }

    /// Asks the mapper to end and returns whether it ended well.
    pub(crate) async fn stop_mapper(&mut self) -> bool {
        let mut mapper = self.mapper.take().expect("the mapper runs");
        let mut kill = Command::new("kill");
        assert!(kill.arg(mapper.id().to_string()).status().unwrap().success());
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = mapper.try_wait().unwrap() {
                return status.success();
            }
            assert!(Instant::now() < end, "the mapper does not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// EdgeCore goes away and comes back with another socket.
    pub(crate) async fn restart_edgecore(&mut self) {
        self.server.abort();
        let _ = (&mut self.server).await;
        *self.told() = Told::default();
        self.server = serve(&self.service, self.directory.path());
    }

    pub(crate) fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.service.told.lock().unwrap()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("mapper.sock")
    }

    /// Calls the mapper as EdgeCore does, and hands the devices over at the next registration too.
    pub(crate) fn mapper(&self) -> DeviceMapperServiceClient<Channel> {
        DeviceMapperServiceClient::new(skerry_dmi::connect(self.socket()))
    }

    pub(crate) fn set_devices(&self, devices: Vec<dmi::Device>) {
        self.service.answer.lock().unwrap().device_list = devices;
    }

    /// What the mapper answers to an HTTP request.
    pub(crate) async fn http(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let stream = tokio::net::TcpStream::connect(("127.0.0.1", self.metrics)).await;
        let mut stream = stream.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// Waits until what was told is as wanted.
    pub(crate) async fn until(&self, what: &str, mut wanted: impl FnMut(&Told) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !wanted(&self.told()) {
            if Instant::now() >= end {
                let log = std::fs::read_to_string(self.directory.path().join("mapper.log"));
                let told = self.told();
                panic!(
                    "not within {PATIENCE:?}: {what}\ntwins: {:?}\nstates: {:?}\n{}",
                    told.twins,
                    told.states,
                    log.unwrap_or_default()
                );
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits for a property's reported value.
    pub(crate) async fn until_reported(&self, device: &str, property: &str, value: &str) {
        let key = (device.to_owned(), property.to_owned());
        self.until(&format!("{device}.{property} is {value}"), |told| {
            told.twins.get(&key).is_some_and(|(reported, _)| reported == value)
        })
        .await;
    }

    /// Waits for a device's state.
    pub(crate) async fn until_state(&self, device: &str, state: &str) {
        self.until(&format!("{device} is {state}"), |told| {
            told.states.iter().rfind(|(name, _)| name == device).is_some_and(|(_, s)| s == state)
        })
        .await;
    }
}

fn serve(service: &Service, directory: &Path) -> JoinHandle<()> {
    let listener = skerry_dmi::bind(directory.join("dmi.sock")).unwrap();
    let service = DeviceManagerServiceServer::new(service.clone());
    tokio::spawn(skerry_dmi::serve(listener, service, std::future::pending()))
}

/// A model from name, type and access of its properties.
pub(crate) fn model(properties: &[(&str, &str, &str)]) -> dmi::DeviceModel {
    let property = |(name, kind, access): &(&str, &str, &str)| dmi::ModelProperty {
        name: (*name).to_owned(),
        r#type: (*kind).to_owned(),
        access_mode: (*access).to_owned(),
        ..Default::default()
    };
    dmi::DeviceModel {
        name: "model".to_owned(),
        namespace: "site-a".to_owned(),
        spec: Some(dmi::DeviceModelSpec { properties: properties.iter().map(property).collect() }),
    }
}

/// A device from its settings and name, desired value and visitors of its properties, read ten times a second.
pub(crate) fn device(
    name: &str,
    settings: Value,
    properties: &[(&str, &str, Value)],
) -> dmi::Device {
    let data = |value: &Value| Some(skerry_dmi::box_map(value.as_object().expect("a map")));
    let property = |(name, desired, visitors): &(&str, &str, Value)| dmi::DeviceProperty {
        name: (*name).to_owned(),
        desired: Some(dmi::TwinProperty { value: (*desired).to_owned(), ..Default::default() }),
        visitors: Some(dmi::VisitorConfig { config_data: data(visitors), ..Default::default() }),
        collect_cycle: 100,
        report_to_cloud: true,
        ..Default::default()
    };
    let protocol =
        dmi::ProtocolConfig { protocol_name: "test".to_owned(), config_data: data(&settings) };
    dmi::Device {
        name: name.to_owned(),
        namespace: "site-a".to_owned(),
        spec: Some(dmi::DeviceSpec {
            device_model_reference: "model".to_owned(),
            protocol: Some(protocol),
            properties: properties.iter().map(property).collect(),
            methods: Vec::new(),
        }),
        status: Some(dmi::DeviceStatus::default()),
    }
}
