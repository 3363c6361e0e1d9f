//! Completing an upload on a condition, as S3 can and object_store has no option for.

use std::fmt;
use std::pin::Pin;

use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
};
use object_store::{ClientOptions, HeaderValue};

/// Makes every `CompleteMultipartUpload` refuse a name that is taken.
///
/// The header is added behind the signature, which covers the headers that it lists and no more;
/// object_store itself does it so for copies. A store that does not know the header passes it over.
#[derive(Debug)]
pub(crate) struct ConditionalComplete;

impl HttpConnector for ConditionalComplete {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let inner = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(Conditional(inner)))
    }
}

struct Conditional(HttpClient);

impl fmt::Debug for Conditional {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Conditional({:?})", self.0)
    }
}

type Answer<'a> = Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'a>>;

impl HttpService for Conditional {
    // What `async_trait` makes of the trait's function.
    fn call<'a, 'b>(&'a self, mut request: HttpRequest) -> Answer<'b>
    where
        'a: 'b,
        Self: 'b,
    {
        if completes_upload(&request) {
            request.headers_mut().insert("if-none-match", HeaderValue::from_static("*"));
        }
        Box::pin(self.0.execute(request))
    }
}

fn completes_upload(request: &HttpRequest) -> bool {
    let query = request.uri().query().unwrap_or_default();
    request.method() == "POST" && query.split('&').any(|pair| pair.starts_with("uploadId="))
}
