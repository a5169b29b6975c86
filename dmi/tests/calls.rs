//! Calls over a real socket: ours, and those of a client that sends the socket's path as authority.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use skerry_dmi::v1beta1 as dmi;
use skerry_dmi::v1beta1::device_manager_service_client::DeviceManagerServiceClient;
use skerry_dmi::v1beta1::device_manager_service_server::{
    DeviceManagerService, DeviceManagerServiceServer,
};
use skerry_dmi::{Peer, bind, connect, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tonic::{Request, Response, Status};

/// Remembers what it was told.
#[derive(Clone, Default)]
struct Recorder {
    registered: Arc<Mutex<Vec<dmi::MapperInfo>>>,
    peers: Arc<Mutex<Vec<Peer>>>,
}

#[tonic::async_trait]
impl DeviceManagerService for Recorder {
    async fn mapper_register(
        &self,
        request: Request<dmi::MapperRegisterRequest>,
    ) -> Result<Response<dmi::MapperRegisterResponse>, Status> {
        self.peers.lock().unwrap().extend(request.extensions().get::<Peer>().copied());
        let mapper =
            request.into_inner().mapper.ok_or_else(|| Status::invalid_argument("mapper"))?;
        self.registered.lock().unwrap().push(mapper);
        let device = dmi::Device { name: "fridge".to_owned(), ..Default::default() };
        Ok(Response::new(dmi::MapperRegisterResponse {
            model_list: Vec::new(),
            device_list: vec![device],
        }))
    }

    async fn report_device_status(
        &self,
        _: Request<dmi::ReportDeviceStatusRequest>,
    ) -> Result<Response<dmi::ReportDeviceStatusResponse>, Status> {
        Ok(Response::new(dmi::ReportDeviceStatusResponse {}))
    }

    async fn report_device_states(
        &self,
        _: Request<dmi::ReportDeviceStatesRequest>,
    ) -> Result<Response<dmi::ReportDeviceStatesResponse>, Status> {
        Err(Status::unimplemented("not part of this test"))
    }
}

struct Running {
    recorder: Recorder,
    directory: tempfile::TempDir,
    stop: tokio::sync::oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join("dmi.sock")
    }
}

fn start() -> Running {
    let directory = tempfile::tempdir().unwrap();
    let listener = bind(directory.path().join("dmi.sock")).unwrap();
    let recorder = Recorder::default();
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let service = DeviceManagerServiceServer::new(recorder.clone());
    let task = tokio::spawn(serve(listener, service, async { drop(stopped.await) }));
    Running { recorder, directory, stop, task }
}

fn request(name: &str) -> dmi::MapperRegisterRequest {
    dmi::MapperRegisterRequest {
        with_data: true,
        mapper: Some(dmi::MapperInfo { name: name.to_owned(), ..Default::default() }),
    }
}

#[tokio::test]
async fn our_client_calls_our_server_again_after_a_restart() {
    let running = start();
    let path = running.socket();
    let mut client = DeviceManagerServiceClient::new(connect(&path));
    let answer = client.mapper_register(request("one")).await.unwrap().into_inner();
    assert_eq!(answer.device_list[0].name, "fridge");
    let peer = running.recorder.peers.lock().unwrap()[0];
    assert_eq!(peer.pid, Some(std::process::id() as i32));

    running.stop.send(()).unwrap();
    running.task.await.unwrap();
    let refused = client.mapper_register(request("two")).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unavailable);

    let recorder = Recorder::default();
    let service = DeviceManagerServiceServer::new(recorder.clone());
    let task = tokio::spawn(serve(bind(&path).unwrap(), service, std::future::pending()));
    client.mapper_register(request("three")).await.unwrap();
    assert_eq!(recorder.registered.lock().unwrap()[0].name, "three");
    task.abort();
}

#[tokio::test]
async fn a_client_that_breaks_the_protocol_disturbs_nobody() {
    let running = start();
    let mut client = DeviceManagerServiceClient::new(connect(running.socket()));
    client.mapper_register(request("one")).await.unwrap();

    let mut rude = UnixStream::connect(running.socket()).await.unwrap();
    rude.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    // The server may say goodbye first; what counts is that it closes.
    let _ =
        tokio::time::timeout(Duration::from_secs(30), rude.read_to_end(&mut rest)).await.unwrap();

    client.mapper_register(request("two")).await.unwrap();
    assert_eq!(running.recorder.registered.lock().unwrap().len(), 2);
}

/// What a client built with grpc-go wrote when it dialled `/etc/kubeedge/dmi.sock` and made three
/// registrations and three reports: preface and frames, the headers compressed.
const GRPC_GO: &[u8] = include_bytes!("../golden/grpc-go-1.67-client.bin");

#[tokio::test]
async fn what_grpc_go_writes_is_understood_however_it_is_cut() {
    for piece in [1, 7, 100, GRPC_GO.len()] {
        let running = start();
        let mut stream = UnixStream::connect(running.socket()).await.unwrap();
        for bytes in GRPC_GO.chunks(piece) {
            stream.write_all(bytes).await.unwrap();
        }
        let registered = running.recorder.registered.clone();
        let all = async {
            while registered.lock().unwrap().len() < 3 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), all).await.unwrap();
        let mut names: Vec<_> =
            registered.lock().unwrap().iter().map(|mapper| mapper.name.clone()).collect();
        names.sort();
        assert_eq!(names, ["go-0", "go-1", "go-2"]);
    }
}
