'use strict';

// The server on the node will accept a browser that comes from this portal, and from nowhere else.
$(() => { document.getElementById('batch_connect_session_context_portal_origin').value = window.location.origin; });
